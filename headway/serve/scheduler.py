"""Which tokens the next pass computes: continuous batching with chunked prefill.

A pass holds one token of every sequence that decodes, then chunks of prompts up to
`max_batch_tokens` (64 beside sequences that decode), so that a long prompt never stalls a stream.
First come, first served. Where a decoding sequence needs a page and none is free, the youngest
gives up its pages and is computed again later.

A sequence has a table of pages for every window that layers have. Where layers see all, it is
admitted with pages for all its tokens; behind a window it takes and gives back pages as it goes."""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from headway.model.paged import PAGE
from headway.serve.blocks import BlockPool, n_reusable
from headway.serve.request import Sequence

MAX_CHUNK_BESIDE = 64
"""Most tokens of prompts in a pass in which sequences decode. A pass of 722M parameters with that
many takes a CPU core about three times as long as one without; with fewer, experts would be read
for few tokens each, and the prompt itself would wait."""


class Chunk(NamedTuple):
    """The next `n_new` tokens of a sequence."""

    sequence: Sequence
    n_new: int


class Copy(NamedTuple):
    """A page that is copied before the next pass."""

    window: int
    """Of the layers that have it."""
    source: int
    target: int


class Scheduler:
    """The sequences that wait and those that run, each in order of arrival.

    Args: pools: of pages, by the window of the layers."""

    def __init__(self, pools: Mapping[int, BlockPool], max_requests: int, max_batch_tokens: int):
        self.pools, self.max_requests = pools, max_requests
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_preemptions = 0

    @property
    def n_pages(self) -> int:
        """Return how many pages there are."""
        return sum(pool.n_pages for pool in self.pools.values())

    @property
    def n_held(self) -> int:
        """Return how many pages sequences hold."""
        return self.n_pages - sum(pool.n_free for pool in self.pools.values())

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next pass, and allocate the pages that they write."""
        chunks = [Chunk(s, 1) for s in self.running if s.n_new == 1]
        budget = self.max_batch_tokens - len(chunks)
        if chunks:
            budget = min(budget, MAX_CHUNK_BESIDE)
        for sequence in self.running:
            if sequence.n_new > 1 and budget > 0:
                chunks.append(Chunk(sequence, min(sequence.n_new, budget)))
                budget -= chunks[-1].n_new
        for sequence, n_new in chunks:
            while sequence.tables and not self._allocate(sequence, n_new):
                self._preempt(self.running[-1])
        chunks = [chunk for chunk in chunks if chunk.sequence.tables]
        while budget > 0 and self.waiting and self._admit(self.waiting[0], budget):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(Chunk(sequence, min(sequence.n_new, budget)))
            budget -= chunks[-1].n_new
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Count the tokens of a chunk as computed; make the pages that they filled known, and give
        back those that no further token sees."""
        sequence, n_new = chunk
        known = sequence.n_computed // PAGE
        sequence.n_computed += n_new
        keys = sequence.keys(sequence.n_computed)
        for window, table in sequence.tables.items():
            pool = self.pools[window]
            for page, key in zip(table.pages[known:], keys[known:], strict=False):
                pool.seal(page, key)
            pool.give_back(table, sequence.n_computed)

    def fork(self, sequence: Sequence, twin: Sequence) -> list[Copy]:
        """Start a further choice that has the tokens of a running sequence. Full pages are shared;
        return the partial ones, which must be copied."""
        full, rest = divmod(sequence.n_computed, PAGE)
        no_page = rest and not all(pool.n_free for pool in self.pools.values())
        if len(self.running) >= self.max_requests or no_page:
            self.waiting.appendleft(twin)  # it matches the full pages when it is admitted
            return []
        copies = []
        for window, table in sequence.tables.items():
            pool = self.pools[window]
            twin.tables[window] = pool.share(table, full)
            if rest:
                twin.tables[window].pages.append(pool.allocate())
                copies.append(Copy(window, table.pages[full], twin.tables[window].pages[full]))
        twin.n_computed = sequence.n_computed
        self.running.append(twin)
        return copies

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its full pages stay known."""
        if sequence.tables:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence pages, known ones where no logits are wanted and there are
        some."""
        if len(self.running) >= self.max_requests:
            return False
        keys = sequence.keys(sequence.n_without_logits)
        keys = keys[: n_reusable(self.pools.values(), keys)]
        n_more = -(-len(sequence.tokens) // PAGE) - len(keys)
        if 0 in self.pools and n_more > self.pools[0].n_free:
            return False  # in every step again: as soon as that is known
        sequence.tables = {window: pool.match(keys) for window, pool in self.pools.items()}
        sequence.n_computed = PAGE * len(keys)
        if not self._allocate(sequence, min(sequence.n_new, budget)):
            self._release(sequence)
            return False
        if sequence.request.n_cached < 0:
            sequence.request.n_cached = sequence.n_computed
        return True

    def _allocate(self, sequence: Sequence, n_new: int) -> bool:
        """Allocate the pages that the next `n_new` tokens write, and those of all tokens where
        layers see all; return False, and allocate none, where there are too few."""
        wanted = []
        for window, table in sequence.tables.items():
            n_tokens = sequence.n_computed + n_new if window else len(sequence.tokens)
            missing, pool = -(-n_tokens // PAGE) - len(table.pages), self.pools[window]
            if missing > pool.n_free:
                return False
            wanted.append((pool, table, missing))
        for pool, table, missing in wanted:
            table.pages += [pool.allocate() for _ in range(missing)]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.n_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for window, table in sequence.tables.items():
            self.pools[window].release(table.pages[table.n_behind :])
        sequence.tables, sequence.n_computed = {}, 0
