"""Which tokens the next pass computes: continuous batching with chunked prefill.

A pass holds one token of every sequence that decodes, then chunks of prompts up to
`max_batch_tokens` (64 beside sequences that decode), so that a long prompt never stalls a stream.
First come, first served. Where a decoding sequence needs a page and none is free, the youngest
gives up its pages and is computed again later.

Where all layers have windows, pages behind the widest are given back while a sequence runs, and a
prefix is found again by the pages that the next token sees."""

import sys
from collections import deque
from typing import NamedTuple

from headway.model.paged import PAGE
from headway.serve.blocks import BlockPool
from headway.serve.request import Sequence

MAX_CHUNK_BESIDE = 64
"""Most tokens of prompts in a pass in which sequences decode. A pass of 722M parameters with that
many takes a CPU core about three times as long as one without; with fewer, experts would be read
for few tokens each, and the prompt itself would wait."""


class Chunk(NamedTuple):
    """The next `n_new` tokens of a sequence."""

    sequence: Sequence
    n_new: int


class Scheduler:
    """The sequences that wait and those that run, each in order of arrival."""

    def __init__(self, pool: BlockPool, max_requests: int, max_batch_tokens: int, window: int = 0):
        """Args: window: positions that a token sees in any layer, its own included; 0: all."""
        self.pool, self.max_requests = pool, max_requests
        self.max_batch_tokens, self.window = max_batch_tokens, window
        self.reach = -(-(window - 1) // PAGE) if window else sys.maxsize
        """Pages before its own that the first token of a page sees."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_preemptions = 0

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next pass, and allocate the pages that they write."""
        chunks = [Chunk(s, 1) for s in self._decoding()]
        budget = self.max_batch_tokens - len(chunks)
        if chunks:
            budget = min(budget, MAX_CHUNK_BESIDE)
        for sequence in self.running:
            if sequence.n_new > 1 and budget > 0:
                chunks.append(Chunk(sequence, min(sequence.n_new, budget)))
                budget -= chunks[-1].n_new
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(Chunk(sequence, min(sequence.n_new, budget)))
            budget -= chunks[-1].n_new
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Count the tokens of a chunk as computed, and make the pages that they filled known."""
        sequence, n_new = chunk
        sequence.n_computed += n_new
        for key in sequence.new_keys(sequence.n_computed):
            self.pool.seal(sequence.pages[len(sequence.keys)], key)
            sequence.keys.append(key)
        if self.window:
            behind = max(sequence.n_computed - self.window + 1, 0) // PAGE
            self.pool.release(sequence.pages[sequence.n_behind : behind])
            sequence.pages[:behind] = [0] * behind
            sequence.n_behind = behind

    def fork(self, sequence: Sequence, twin: Sequence) -> tuple[int, int] | None:
        """Start a further choice that has the tokens of a running sequence. Full pages are shared;
        return which page (source, target) must be copied, if any."""
        full, rest = divmod(sequence.n_computed, PAGE)
        if len(self.running) >= self.max_requests or self.pool.n_free < (rest > 0):
            self.waiting.appendleft(twin)  # it matches the full pages when it is admitted
            return None
        for page in sequence.pages[sequence.n_behind : full]:
            self.pool.hold(page)
        twin.pages, twin.keys = sequence.pages[:full], list(sequence.keys)
        twin.n_computed, twin.n_behind = sequence.n_computed, sequence.n_behind
        self.running.append(twin)
        if not rest:
            return None
        twin.pages.append(self.pool.allocate())
        return sequence.pages[full], twin.pages[full]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its full pages stay known."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _decoding(self) -> list[Sequence]:
        """Return the sequences that decode, oldest first, each with a page for its next token."""
        ready: list[Sequence] = []
        for sequence in [s for s in self.running if s.n_new == 1]:
            while sequence.needs_pages and not self.pool.n_free and sequence in self.running:
                self._preempt(self.running[-1])
            if sequence in self.running:
                self._allocate(sequence)
                ready.append(sequence)
        return [s for s in ready if s in self.running]

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all its tokens, known ones where no logits are wanted
        and there are some."""
        if len(self.running) >= self.max_requests:
            return False
        keys = sequence.new_keys(sequence.n_without_logits)
        sequence.keys = keys[: self.pool.n_reusable(keys, self.reach)]
        sequence.n_behind = max(len(sequence.keys) - self.reach, 0)
        behind, seen = [0] * sequence.n_behind, sequence.keys[sequence.n_behind :]
        sequence.pages = behind + self.pool.match(seen)
        sequence.n_computed = PAGE * len(sequence.pages)
        if sequence.needs_pages > self.pool.n_free:
            self._release(sequence)
            return False
        if not (sequence.admitted or sequence.row.output):
            sequence.request.n_cached = sequence.n_computed
        sequence.admitted = True
        self._allocate(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.n_preemptions += 1

    def _allocate(self, sequence: Sequence) -> None:
        sequence.pages += [self.pool.allocate() for _ in range(sequence.needs_pages)]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages[sequence.n_behind :])
        sequence.pages, sequence.keys = [], []
        sequence.n_computed = sequence.n_behind = 0
