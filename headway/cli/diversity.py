"""`headway diversity`: how different the documents of texts are."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError

if TYPE_CHECKING:
    from headway.hub.load import LoadedModel


@dataclass(frozen=True)
class Diversity:
    """Vendi score, mean cosine and near-duplicates of texts, at the same number of documents; with
    a model also G-Vendi, the Vendi score of its gradients."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH [PATH …]")]
    """Texts, as for `train --data`."""
    model: str = ""
    """A run, a checkpoint or a Hugging Face folder, for G-Vendi."""
    n: int = 1000
    """Documents that are drawn of each text; of all as few as the smallest has."""
    order: float = 1.0
    """Order of the Vendi score: below 1 rare documents count more, above 1 less; inf is allowed."""
    seed: int = 0
    """Of the documents that are drawn and of the intervals."""
    json: bool = False
    """End with one JSON object."""


def diversity(args: Sequence[str]) -> int:
    """Run `headway diversity PATH [PATH …]` and return its exit code."""
    options = parse(Diversity, args, "headway diversity")
    if options.n < 2:
        raise UsageError(f"--n {options.n} is below 2")
    if not options.order > 0:
        raise UsageError(f"--order {options.order:g} is not above 0; use 1, 2, 0.5 or inf")

    import numpy as np

    from headway.eval import diversity as scores
    from headway.lab.results import as_text

    texts = [_drawn(path, options.n, options.seed) for path in options.paths]
    n = min(map(len, texts))
    if n < 2:
        few = options.paths[[len(t) for t in texts].index(n)]
        raise UsageError(f"{few} has {n} documents; a diversity needs two or more")
    texts = [documents[:n] for documents in texts]
    features = [scores.hashed_words(documents) for documents in texts]
    several = len(texts) > 1
    centre = np.concatenate(features).mean(0) if several else None
    sketches = _has_datasketch()
    loaded = _load(options.model) if options.model else None
    vendi = partial(scores.vendi, order=options.order)
    rows = []
    for path, documents, x_ND in zip(options.paths, texts, features, strict=True):
        value, ci95 = scores.with_interval(x_ND, vendi, options.seed)
        row: dict[str, Any] = {
            "path": path,
            "vendi": value,
            "vendi_ci95": ci95 and list(ci95),
            "mean_cosine": scores.mean_cosine(x_ND, centre),
            "near_duplicates": scores.near_duplicate_rate(documents) if sketches else None,
        }
        if loaded is not None:
            ids = _token_ids(loaded, documents)
            g_ND = scores.gradients(loaded.model, ids, seed=options.seed)
            value, ci95 = scores.with_interval(g_ND, vendi, options.seed)
            row |= {"g_vendi": value, "g_vendi_ci95": ci95 and list(ci95)}
        rows.append(row)
    print(as_text(rows))
    print(f"{n} documents of each; cosines {'from the common mean' if several else 'not centred'}")
    print_json(options.json, {"n": n, "order": options.order, "centred": several, "rows": rows})
    return 0


def _drawn(path: str, n: int, seed: int) -> list[str]:
    """Return n documents of a source, each as likely as any other, in a random order; all of them
    where there are fewer. No more than n are held at once."""
    generator = random.Random(seed)
    drawn: list[str] = []
    for i, text in enumerate(_documents(path)):
        if i < n:
            drawn.append(text)
        elif (place := generator.randrange(i + 1)) < n:
            drawn[place] = text
    generator.shuffle(drawn)
    return drawn


def _documents(path: str) -> Iterator[str]:
    """Yield the documents of a source, without empty ones."""
    from headway.data.document import TextPiece
    from headway.data.units import plan, read

    parts: list[str] = []
    for unit in plan(path, 0.0)[0]:
        for piece in read(unit):
            if isinstance(piece, TextPiece):
                parts = [piece.text] if piece.begins else [*parts, piece.text]
                if piece.ends and (text := "".join(parts)).strip():
                    yield text


def _has_datasketch() -> bool:
    """Return whether near-duplicates can be counted; print why not."""
    from headway.data.near_duplicates import check_installed

    try:
        check_installed("the near-duplicate rate")
    except UsageError as error:
        print(f"note: {error}")
        return False
    return True


def _load(model: str) -> "LoadedModel":
    """Return a model that has gradients."""
    from headway.hub.load import load_model

    return load_model(model, packed=False)


def _token_ids(loaded: "LoadedModel", documents: Sequence[str]) -> list[list[int]]:
    """Return the ids of documents, cut to the context, those of one token behind the token that
    ends a text."""
    tokenizer, room = loaded.tokenizer, loaded.info.max_len + 1
    ids = [list(map(int, part))[:room] for part in tokenizer.encode_batch(documents)]
    return [part if len(part) > 1 else [tokenizer.eos, *part] for part in ids]
