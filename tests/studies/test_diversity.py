"""The texts of the study of diversity, and what its rule makes of rows by hand."""

import numpy as np
import pytest

from studies import diversity
from studies.template_texts import documents, near_copies, templates, words


def test_texts_have_their_templates_and_names():
    rng = np.random.default_rng(0)
    known, names = templates(rng, 3), words(rng, 2, 3)
    assert len(set(names)) == 2 and all(sum(not w for w in t) == 3 for t in known)
    texts = documents(rng, 40, known, names)
    sentences = {s.rstrip(".") for text in texts for s in text.split("\n")}
    capitals = {w for s in sentences for w in s.split() if w.isupper()}
    assert capitals == {name.upper() for name in names}
    plain = {" ".join("" if w.isupper() else w for w in s.split()) for s in sentences}
    assert plain == {" ".join(t) for t in known}
    copies = near_copies(rng, texts)
    changed = [new for old, new in zip(texts, copies, strict=True) if new != old]
    assert len(changed) == 12 and all(new.rsplit(" ", 1)[0] in texts for new in changed)


def rows(g_vendi, vendi, cosine, worse):
    grid = [
        {"text": str(i), "bits": 5.0 - i, "g_vendi": g, "vendi": v, "mean_cosine": c}
        for i, (g, v, c) in enumerate(zip(g_vendi, vendi, cosine, strict=True))
    ]
    pair = [
        {
            "text": text, "g_vendi": None, "vendi": v,
            "bits by seed": ", ".join(str(3.0 + more * (text != "plain")) for more in worse),
        }
        for text, v in (("plain", 9.0), ("30% near-copies", 7.0))
    ]  # fmt: skip
    return [*grid, *pair]


@pytest.mark.parametrize(
    ("g_vendi", "worse", "answer"),
    [
        ((1, 2, 3, 4, 5), (0.1, 0.12, 0.1), "holds"),
        ((1, 2, 3, 4, 5), (0.1, -0.2, 0.1), "cannot_tell"),
        ((1, 2, 3, 4, 5), (-0.1, -0.15, -0.1), "refuted"),
        ((5, 2, 3, 4, 1), (0.1, 0.2, 0.1), "refuted"),
    ],
)
def test_the_rule(g_vendi, worse, answer):
    said = diversity.judge(rows(g_vendi, (1, 2, 3, 5, 4), (3, 5, 4, 2, 1), worse))
    assert said.answer == answer and "−Vendi of words 0.90" in said.why


def test_a_row_has_the_mean_over_its_seeds():
    row = diversity._row("a text", (3.0, 3.5), {"vendi": 2.0})
    assert row == {"text": "a text", "bits": 3.25, "bits by seed": "3.000, 3.500", "vendi": 2.0}
