"""Which page of the cache holds what: reference counts, and reuse of equal prefixes.

A full page is known by a hash of its tokens and of all tokens before it, so equal prefixes have
equal keys, page by page:

    key_i = sha256(key_{i−1} · tokens 16·i … 16·i + 15),  key_{−1} = sha256(salt)

A page that nobody holds keeps what it has until it is needed again, least recently released first.
A sequence releases its pages last one first, so that the tail of a text goes before its head.

Layers that see equally far have a pool of their own. Behind a window pages are given back while
their sequence runs, and a prefix is found again by the pages that the next token sees."""

import hashlib
import sys
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headway.config import EngineConfig
from headway.model.paged import PAGE

DEFAULT_CACHE_BYTES = 1 << 30


def page_keys(tokens: Sequence[int], salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
    """Return the key of each full page of a text, the first of which are `known`. Texts with
    different salts share none."""
    keys = list(known)
    for start in range(PAGE * len(keys), len(tokens) - PAGE + 1, PAGE):
        key = keys[-1] if keys else hashlib.sha256(salt.encode()).digest()
        page = array("i", tokens[start : start + PAGE]).tobytes()
        keys.append(hashlib.sha256(key + page).digest())
    return keys


def reach_of(window: int) -> int:
    """Return how many pages before its own the first token of a page sees."""
    return -(-(window - 1) // PAGE) if window else sys.maxsize


@dataclass(slots=True)
class Table:
    """The pages of a sequence in one pool."""

    pages: list[int] = field(default_factory=list)
    """One for every 16 tokens; those that are given back stand here as 0."""
    n_behind: int = 0
    """How many pages, the first ones, are given back."""


class BlockPool:
    """The pages 0 … n_pages − 1 of layers with this `window`: positions that a token sees, its own
    included; 0: all."""

    def __init__(self, n_pages: int, window: int = 0):
        self.n_pages, self.window, self.reach = n_pages, window, reach_of(window)
        self._holders = [0] * n_pages
        self._key_of: list[bytes | None] = [None] * n_pages
        self._page_of: dict[bytes, int] = {}
        # those without a holder, least recently released first
        self._free = OrderedDict.fromkeys(range(n_pages))

    @property
    def n_free(self) -> int:
        """Return how many pages nobody holds."""
        return len(self._free)

    def __contains__(self, key: bytes) -> bool:
        """Return whether a page is known by this key."""
        return key in self._page_of

    def match(self, keys: Sequence[bytes]) -> Table:
        """Return and hold the pages with these keys, of those that the token after them sees; all
        of these are known."""
        n_behind = max(len(keys) - self.reach, 0)
        pages = [self._page_of[key] for key in keys[n_behind:]]
        return self.share(Table([0] * n_behind + pages, n_behind), len(keys))

    def share(self, table: Table, n_pages: int) -> Table:
        """Return a table with the first pages of another, and hold them."""
        twin = Table(table.pages[:n_pages], table.n_behind)
        for page in twin.pages[twin.n_behind :]:
            self._hold(page)
        return twin

    def give_back(self, table: Table, n_tokens: int) -> None:
        """Release the pages that no token after the first `n_tokens` sees."""
        behind = max(n_tokens - self.window + 1, 0) // PAGE if self.window else 0
        if behind > table.n_behind:
            self.release(table.pages[table.n_behind : behind])
            table.pages[:behind] = [0] * behind
            table.n_behind = behind

    def _hold(self, page: int) -> None:
        if not self._holders[page]:
            del self._free[page]
        self._holders[page] += 1

    def allocate(self) -> int:
        """Return and hold a page whose content is forgotten; there must be a free one."""
        page, _ = self._free.popitem(last=False)
        self.forget((page,))
        self._holders[page] = 1
        return page

    def seal(self, page: int, key: bytes) -> None:
        """Make a page known, after the pass that filled it. Where an equal one is known already,
        that one stays."""
        self._key_of[page] = key
        self._page_of.setdefault(key, page)

    def forget(self, pages: Iterable[int]) -> None:
        """Make pages known no more: those that are written anew, or that a failed pass wrote."""
        for page in pages:
            key, self._key_of[page] = self._key_of[page], None
            if key is not None and self._page_of.get(key) == page:
                del self._page_of[key]

    def release(self, pages: Sequence[int]) -> None:
        """Take a holder from each of the pages of a sequence, last page first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free[page] = None


def n_reusable(pools: Iterable[BlockPool], keys: Sequence[bytes]) -> int:
    """Return the length of the longest prefix of `keys` of which every pool knows the pages that
    the token after it sees."""
    n, pools = len(keys), list(pools)
    while lacks := [i for p in pools for i in range(max(n - p.reach, 0), n) if keys[i] not in p]:
        n = min(lacks)  # with more pages, this one is seen
    return n


def pool_sizes(windows: Iterable[int], n_pages: int, config: EngineConfig) -> dict[int, int]:
    """Return how many pages the layers of each window get where those that see all have `n_pages`:
    behind a window what running sequences see and a pass writes, and as many again for
    prefixes."""
    written = config.max_batch_tokens // PAGE
    return {
        window: min(n_pages, 2 * (config.max_requests * (reach_of(window) + 2) + written))
        for window in windows
    }


def default_pages(page_bytes: Mapping[int, int], max_len: int, config: EngineConfig) -> int:
    """Return as many pages as all requests of `max_len` tokens need, or as fit
    `DEFAULT_CACHE_BYTES`, but enough for one. `page_bytes`: of a page in all layers with the same
    window, by window."""

    def n_bytes(n_pages: int) -> int:
        sizes = pool_sizes(page_bytes, n_pages, config)
        return sum(page_bytes[window] * n for window, n in sizes.items())

    most = -(-config.max_requests * max_len // PAGE)
    fit = bisect_right(range(most + 1), DEFAULT_CACHE_BYTES, key=n_bytes) - 1
    return max(fit, -(-max_len // PAGE))
