"""A document is one text of a source, read lazily in pieces; some are kept for validation."""

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np

from headway.config import UsageError
from headway.data.files import BadData, forward, open_file

Split = Literal["train", "val"]
T = TypeVar("T")
Uint64 = TypeVar("Uint64", int, np.ndarray)

GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
"""2⁶⁴ over the golden ratio, the step of splitmix64."""

PIECE_BYTES = 1 << 20
"""A document is read in blocks of this size and cut after the last newline of each, so that one of
any size fits in memory, and so that a process can begin at any block."""


@dataclass(frozen=True)
class TextPiece:
    """A piece of a document: what a tokenizer gets at once."""

    text: str
    begins: bool
    """The document begins here."""
    ends: bool
    """It ends here."""


@dataclass(frozen=True)
class Text:
    """A document held in memory: a row of a data set, or a small file."""

    name: str
    """Where it came from, for error messages."""
    text: str
    """The document."""

    def pieces(self) -> Iterator[TextPiece]:
        """Return the text, cut as that of a file is: equal documents have equal tokens."""
        if len(self.text) <= PIECE_BYTES // 4:  # a character has at most 4 bytes
            yield TextPiece(self.text, True, True)
            return
        content = self.text.encode()
        for _, part, begins, ends in _cut(io.BytesIO(content), 0, len(content)):
            yield TextPiece(part.decode(), begins, ends)

    def halves(self, val_fraction: float) -> tuple["Text", "Text"]:
        """Return head and tail: the first 1 − val_fraction of the characters, and the rest."""
        cut = int(len(self.text) * (1 - val_fraction))
        return Text(self.name, self.text[:cut]), Text(self.name, self.text[cut:])


@dataclass(frozen=True)
class Bad:
    """A document that cannot be read."""

    why: str
    """One line that names the place, the reason and the fix."""
    begins: bool = True
    """False after pieces of it that could be read."""
    numbered: bool = False
    """Whether it counts in the choice of validation documents: a text does, a row does not."""
    file: bool = False
    """Whether it is a whole file of rows that cannot be read, which each of its spans says."""


@dataclass(frozen=True)
class TextFile:
    """A document in a file: bytes [start, end) of (unpacked) UTF-8, read only when asked for."""

    path: Path
    start: int = 0
    end: int | None = None
    """None is the end of the file, for one whose unpacked size is unknown."""

    def pieces(self, first: int | None = None, last: int | None = None) -> Iterator[TextPiece]:
        """Yield the pieces whose end lies in the bytes [first, last) of the file, both a whole
        number of blocks from `start`; None: all. Raise BadData if it is not UTF-8 or has NULs."""
        with open_file(self.path) as file:
            for at, content, begins, ends in _cut(file, self.start, self.end, first, last):
                if b"\0" in content:
                    raise _binary(self.path, f"a NUL byte at {at + content.index(0):,}")
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError as error:
                    what = f"byte 0x{content[error.start]:02x} at {at + error.start:,}"
                    raise _binary(self.path, what) from None
                yield TextPiece(text if at else text.removeprefix("\ufeff"), begins, ends)

    def halves(self, val_fraction: float) -> tuple["TextFile", "TextFile"]:
        """Return the first 1 − val_fraction of the bytes, up to a whole character, and the rest."""
        end = self.end
        if end is None:
            with open_file(self.path) as file:
                end = sum(len(block) for block in iter(lambda: file.read(PIECE_BYTES), b""))
        cut = self.start + int((end - self.start) * (1 - val_fraction))
        with open_file(self.path) as file:
            forward(file, cut)
            following = file.read(4)
        cut += next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
        return TextFile(self.path, self.start, cut), TextFile(self.path, cut, end)


def validation_numbers(val_fraction: float) -> Iterator[int]:
    """Yield the numbers of the documents that are kept for validation, rising, without end.

    Each run of about 1/val_fraction documents gives one, at a pseudo-random place of the run (a
    fixed function of its number), so the share is right to within one document, follows no period
    of the data, and needs nobody to know how many documents there are. The first run gives its
    second document, so that two documents make both splits."""
    share = Fraction(str(val_fraction))
    yield 1
    for run in itertools.count(1):
        begin, end = (-int(-edge // share) for edge in (run, run + 1))
        yield begin + scramble((run + 1) * GOLDEN & _MASK) % (end - begin)


def split(stream: Iterable[T], val_fraction: float) -> Iterator[tuple[Split, T]]:
    """Mark each document as training or validation, in one pass."""
    numbers = validation_numbers(val_fraction)
    following = next(numbers)
    for number, document in enumerate(stream):
        yield ("val" if number == following else "train"), document
        if number == following:
            following = next(numbers)


def _cut(
    file: BinaryIO, start: int, end: int | None, first: int | None = None, last: int | None = None
) -> Iterator[tuple[int, bytes, bool, bool]]:
    """Yield (place, content, whether the document begins, ends there) per piece; see `pieces`."""
    position = start if first is None else first
    carry = b""
    if position > start:
        forward(file, position - PIECE_BYTES)
        before = file.read(PIECE_BYTES)
        carry = before[_cut_of(before) :]
    else:
        forward(file, position)

    def read(at: int) -> bytes:
        wanted = PIECE_BYTES if end is None else min(PIECE_BYTES, end - at)
        block = file.read(wanted)
        if end is not None and len(block) < wanted:
            raise UsageError(f"{file.name} became shorter while it was read; try again")
        return block

    block = read(position)
    while block and (last is None or position < last):
        following = read(position + len(block))
        cut = _cut_of(block) if following else len(block)
        yield position - len(carry), carry + block[:cut], position == start, not following
        position += len(block)
        block, carry = following, block[cut:]


def _cut_of(block: bytes) -> int:
    """Return where a piece ends in a block: after its last newline, else last full character."""
    if newline := block.rfind(b"\n") + 1:
        return newline
    for back in range(1, min(3, len(block)) + 1):
        byte = block[-back]
        if byte & 0xC0 != 0x80:
            length = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return len(block) - back if length > back else len(block)
    return len(block)


def scramble(value: Uint64) -> Uint64:
    """Apply the finaliser of splitmix64 (Steele, Lea & Flood 2014) to an integer below 2⁶⁴ or to
    each of a uint64 array: a bijection that spreads every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _binary(path: Path, what: str) -> BadData:
    fix = "convert it, or choose files by a glob such as 'DIR/**/*.txt'"
    return BadData(f"{path} is not UTF-8 text ({what}); {fix}")
