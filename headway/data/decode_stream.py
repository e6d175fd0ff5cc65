"""Text of token ids that come one at a time, in time linear in their number."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol


class DecodeStream(Protocol):
    """A decoder of ids as they come. What its steps and its end return joins to what `decode` of
    all ids returns."""

    def step(self, i: int) -> str:
        """Return the text that id `i` completes; empty within a character of several tokens."""
        ...

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD for a character that never was completed."""
        ...


class ByteStream:
    """A decoder of tokens that are bytes of UTF-8. Bytes that are no UTF-8 become U+FFFD."""

    def __init__(
        self, texts_V: Sequence[bytes], shown: Mapping[int, bytes] | None = None, spaces: int = 0
    ) -> None:
        """Args: texts_V: the bytes of each id. shown: texts of special ids, which `texts_V` lacks.
        spaces: how many the first token of a text may lose, as SentencePiece puts one before it."""
        self._texts_V, self._shown, self._spaces = texts_V, shown or {}, spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, i: int) -> str:
        """Return the text that id `i` completes."""
        text = self._shown.get(i) or (self._texts_V[i] if i < len(self._texts_V) else b"")
        if text and self._spaces:
            n_leading = len(text) - len(text.lstrip(b" "))
            text = text[min(self._spaces, n_leading) :]
            self._spaces = 0
        return self._decoder.decode(text)

    def finish(self) -> str:
        """Return U+FFFD for a character that is not complete."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """A decoder of tokens whose text depends on their neighbours in a way that only the library
    knows: it decodes those shown last together with those not shown yet."""

    def __init__(self, decode: Callable[[list[int]], str], before: Iterable[int] = ()) -> None:
        """Args: before: the last ids of what the text continues."""
        self._decode, self._ids = decode, list(before)
        self._n_shown = len(self._ids)

    def step(self, i: int) -> str:
        """Return the text that id `i` completes."""
        self._ids.append(i)
        n_waiting = len(self._ids) - self._n_shown
        text = self._rest()
        if not text or (text.endswith("\ufffd") and n_waiting < 8):  # no character has 8 tokens
            return ""
        self._ids = self._ids[self._n_shown :]
        self._n_shown = len(self._ids)
        return text

    def finish(self) -> str:
        """Return the text of the ids that wait."""
        return self._rest()

    def _rest(self) -> str:
        """Return the text beyond what was shown."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._n_shown])) :]
