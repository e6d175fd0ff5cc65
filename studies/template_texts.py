"""Texts that are made of templates and names, and near-copies of their documents."""

from collections.abc import Sequence

import numpy as np

SENTENCES, COPIES = 4, 0.3
"""Of a document; the share of documents that near-copies replace."""
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu".split()
Templates = list[list[str]]


def words(rng: np.random.Generator, n: int, syllables: int) -> list[str]:
    """Return n different words."""
    drawn: dict[str, None] = {}
    while len(drawn) < n:
        drawn["".join(rng.choice(SYLLABLES, syllables))] = None
    return list(drawn)


def templates(rng: np.random.Generator, n: int) -> Templates:
    """Return sentences of eight of 120 words, three of which are left open."""
    rows = rng.choice(words(np.random.default_rng(1), 120, 2), (n, 8)).astype(object)
    for row in rows:
        row[rng.choice(8, 3, replace=False)] = ""
    return rows.tolist()


def documents(rng: np.random.Generator, n: int, of: Templates, names: Sequence[str]) -> list[str]:
    """Return documents of four sentences; a name is written in capitals."""

    def sentence() -> str:
        chosen = of[rng.integers(len(of))]
        return " ".join(word or str(rng.choice(names)).upper() for word in chosen) + "."

    return ["\n".join(sentence() for _ in range(SENTENCES)) for _ in range(n)]


def near_copies(rng: np.random.Generator, texts: Sequence[str]) -> list[str]:
    """Return texts, 30% of which are replaced by others with one more word at their end."""
    changed, order = list(texts), rng.permutation(len(texts))
    n = int(COPIES * len(texts))
    for to, source in zip(order[:n], rng.choice(order[n:], n), strict=True):
        changed[to] = f"{texts[source]} {rng.choice(SYLLABLES)}"
    return changed
