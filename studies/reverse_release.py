"""Which page of a finished request is evicted first: its last or its first?

Prompts of a few families (a shared head each: instructions, a document) end in tails of their own.
A page is found again only if all pages before it are there, so a tail without its head is dead
memory. Both arms run the pool of the engine on the same requests; only the order differs in which
the pages of a request are released."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from headway.lab.measurement import Measurement, Row, Verdict, mean_error
from headway.model.paged import PAGE
from headway.serve.blocks import BlockPool, n_reusable, page_keys

N_REQUESTS, N_FAMILIES, AT_ONCE = 1500, 40, 8
HEAD_PAGES, TAIL_PAGES = (4, 33), (1, 13)
"""Pages of a shared head and of a tail: least, and most + 1."""


def requests(seed: int) -> list[list[int]]:
    """Texts in order of arrival; the popularity of families falls as 1/rank."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(1000, size=PAGE * rng.integers(*HEAD_PAGES)) for _ in range(N_FAMILIES)]
    share = 1 / np.arange(1, N_FAMILIES + 1)
    families = rng.choice(N_FAMILIES, N_REQUESTS, p=share / share.sum())
    tails = (rng.integers(1000, size=PAGE * rng.integers(*TAIL_PAGES)) for _ in families)
    return [[*heads[f].tolist(), *tail.tolist()] for f, tail in zip(families, tails, strict=True)]


def hit_rate(texts: Sequence[list[int]], n_pages: int, tails_first: bool) -> float:
    """Share of all pages that were in the cache when their request came; `AT_ONCE` run at once."""
    pool, running = BlockPool(n_pages), deque[list[int]]()
    hits = total = 0
    for text in texts:
        if len(running) == AT_ONCE:
            pages = running.popleft()
            # release() goes from the last page to the first
            pool.release(pages if tails_first else pages[::-1])
        keys = page_keys(text)
        pages = pool.match(keys[: n_reusable([pool], keys)]).pages
        hits, total = hits + len(pages), total + len(keys)
        for key in keys[len(pages) :]:
            pages.append(pool.allocate())
            pool.seal(pages[-1], key)
        running.append(pages)
    return hits / total


def measure(seeds: int = 8, sizes: Sequence[int] = (360, 500, 700, 1000)) -> list[Row]:
    rows = []
    for n_pages in sizes:
        texts = [requests(seed) for seed in range(seeds)]
        tails = [hit_rate(t, n_pages, tails_first=True) for t in texts]
        heads = [hit_rate(t, n_pages, tails_first=False) for t in texts]
        gain, error = mean_error([a - b for a, b in zip(tails, heads, strict=True)])
        rows.append(
            {
                "pages": n_pages,
                "hit rate, tails first": mean_error(tails)[0],
                "hit rate, heads first": mean_error(heads)[0],
                "gain": gain,
                "its standard error": error,
            }
        )
    return rows


def judge(rows: Sequence[Row]) -> Verdict:
    low = min(row["gain"] - 2 * row["its standard error"] for row in rows)
    high = min(row["gain"] + 2 * row["its standard error"] for row in rows)
    answer = "refuted" if high < 0 else "holds" if low > 0 else "cannot_tell"
    gains = [row["gain"] for row in rows]
    return Verdict(
        answer, f"Tails first gain {min(gains):+.1%} to {max(gains):+.1%} of all pages as hits."
    )


STUDY = Measurement(
    "reverse_release",
    "Under memory pressure a cache that evicts the tails of finished requests first finds more of "
    "its pages again than one that evicts heads first.",
    "Holds if the gain in hit rate is above 0 by two standard errors over seeds at every size of "
    "the cache, refuted if it is below 0 by as much at any.",
    measure,
    judge,
)
