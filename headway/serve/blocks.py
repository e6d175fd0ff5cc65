"""Which page of the cache holds what: reference counts, and reuse of equal prefixes.

A full page is known by a hash of its tokens and of all tokens before it, so equal prefixes have
equal keys, page by page:

    key_i = sha256(key_{i−1} · tokens 16·i … 16·i + 15),  key_{−1} = sha256(salt)

A page that nobody holds keeps what it has until it is needed again, least recently released first.
A sequence releases its pages last one first, so that the tail of a text goes before its head."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from headway.model.paged import PAGE


def first_key(salt: str) -> bytes:
    """Return the key that stands before the first page. Texts with different salts share none."""
    return hashlib.sha256(salt.encode()).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of the page that holds 16 `tokens`, after the page with `key`."""
    return hashlib.sha256(key + np.array(tokens, "<i4").tobytes()).digest()


def page_keys(tokens: Sequence[int], salt: str = "") -> list[bytes]:
    """Return the key of each full page of a text."""
    keys, key = [], first_key(salt)
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        key = next_key(key, tokens[start : start + PAGE])
        keys.append(key)
    return keys


class BlockPool:
    """The pages 0 … n_pages − 1."""

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self._holders = [0] * n_pages
        self._key_of: list[bytes | None] = [None] * n_pages
        self._page_of: dict[bytes, int] = {}
        # those without a holder, least recently released first
        self._free = OrderedDict.fromkeys(range(n_pages))

    @property
    def n_free(self) -> int:
        """Return how many pages nobody holds."""
        return len(self._free)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Return and hold the pages of the longest known prefix of `keys`."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self.hold(page)
            pages.append(page)
        return pages

    def n_reusable(self, keys: Sequence[bytes], reach: int) -> int:
        """Return the length of the longest prefix of `keys` whose last `reach` pages are known:
        those that the tokens after it see."""
        longest = run = 0
        for i, key in enumerate(keys, start=1):
            run = run + 1 if key in self._page_of else 0
            if run >= min(i, reach):
                longest = i
        return longest

    def hold(self, page: int) -> None:
        """Add a holder to a page."""
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
