"""One model on products of every size up to four digits by four, and what it has wrong of each."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from headway.data.worlds.source import WorldSource
from headway.hub.load import load_model
from headway.lab.experiment import Arm
from headway.lab.rows import Row
from headway.lab.statistics import t_interval
from headway.model.build import build_block
from headway.model.transformer import Transformer
from studies.world_arms import LoopedBlocks, arm, tensor_names

FORMS = {"direct": "", "last first": ",order=lsb", "scratch-pad": ",order=lsb,form=scratch"}
"""What is written behind the factors."""
DIGITS = (1, 2, 3, 4)
ITEMS = 512
"""Test items of each size, none of which is in training in either order of its factors."""
PLACES = "first digit", "worst middle digit", "last digit"
Cell = tuple[str, str]
"""A form, or "looped" for the direct one of a model with a layer applied twice; and a design."""


def worlds(form: str) -> tuple[str, ...]:
    """Return the products of m by n digits, for all m and n, in a form."""
    return tuple(f"multiplication,m={m},n={n}{FORMS[form]}" for m in DIGITS for n in DIGITS)


def on_all_sizes(name: str, form: str, design: str = "") -> Arm:
    """Return a design (`world_arms.arm`) that is trained on all sizes alike, in float32."""
    source = tuple(f"world:{world}" for world in worlds(form))
    fields = {"data__source": source, "run__dtype": "float32"}
    return arm(name, worlds(form)[-1], design, **fields)


def wrong_of(m: int, n: int) -> str:
    """Return the name of the score that is the share of items wrong at a size."""
    return f"{m}x{n} wrong"


def scores(folder: Path) -> dict[str, float]:
    """Return the share of items wrong at each size (one error in what is written makes an item
    wrong, as it does in greedy decoding), and at squares of two digits and more the share of
    products of m + n digits whose first, middle and last digit is wrong after right ones."""
    shared = not any("layers.1." in name for name in tensor_names(folder))
    blocks = LoopedBlocks() if shared else build_block
    loaded = load_model(folder, dtype="float32", threads=1, blocks=blocks, packed=False)
    result: dict[str, float] = {}
    for spec in loaded.config.data.source:
        source = WorldSource.open(spec, loaded.tokenizer)
        m, n = source.world.digits  # type: ignore[attr-defined]
        wrong_BT, asked_BT = _wrong(loaded.model, loaded.tokenizer.vocab_size, source)
        result[wrong_of(m, n)] = float(wrong_BT.any(1).mean())
        if m == n > 1:
            # the last target of a row is the full stop; a product without leading zero fills it
            of_product_BD = wrong_BT[asked_BT[:, -1], -1 - m - n : -1]
            wrong_D = of_product_BD.mean(0)
            if "order=lsb" in spec:
                wrong_D = wrong_D[::-1]
            of_places = wrong_D[0], wrong_D[1:-1].max(), wrong_D[-1]
            for place, share in zip(PLACES, of_places, strict=True):
                result[f"{wrong_of(m, n)}, {place}"] = float(share)
    return result


def _wrong(
    model: Transformer, vocab_size: int, source: WorldSource
) -> tuple[np.ndarray, np.ndarray]:
    """Return which targets of test items are not the likeliest word, and which are targets; bool
    [B, T]."""
    rows = source.rows("test", np.arange(ITEMS, dtype=np.uint64), source.world.n_tokens)
    with torch.no_grad():
        logits_BTV = model(torch.from_numpy(rows.tokens_BS)).logits_BSV
    assert logits_BTV is not None
    best_BT = logits_BTV[..., :vocab_size].argmax(-1).numpy()
    asked_BT = rows.targets_BS >= 0
    return (best_BT != rows.targets_BS) & asked_BT, asked_BT


def of(rows: Sequence[Row], cell: Cell) -> list[dict[str, float]]:
    """Return the scores of a form and a design, by seed in their order."""
    form, design = cell
    corpus, arm = ("direct", f"looped, {design}") if form == "looped" else cell
    chosen = [row for row in rows if (row["corpus"], row["arm"]) == (corpus, arm)]
    return [row["scores"] for row in sorted(chosen, key=lambda row: row["seed"])]


def of_all(scored: dict[str, float]) -> float:
    """Return the share of items wrong, in the mean over all sizes."""
    return mean(scored[wrong_of(m, n)] for m in DIGITS for n in DIGITS)


def helps(rows: Sequence[Row], pairs: Sequence[tuple[Cell, Cell]], margin: float) -> str:
    """Return whether the second of each pair has fewer items wrong, in the mean over all sizes, by
    more than a margin: "all" or "none" where the 95% interval over seeds of each pair says so,
    "some" where that of one does, else "open"."""
    spans = []
    for before, after in pairs:
        both = zip(of(rows, before), of(rows, after), strict=True)
        spans.append(t_interval([of_all(a) - of_all(b) for a, b in both]))
    if all(span.low > margin for span in spans):
        return "all"
    if all(span.high < margin for span in spans):
        return "none"
    return "some" if any(span.low > margin for span in spans) else "open"
