"""A document is one text of a source, read lazily; a stream of them is split into training and
validation."""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

from headway.config import UsageError

Split = Literal["train", "val"]

PIECE_BYTES = 1 << 20
"""A text file is read in pieces of this size, cut after a newline, so a file of any size fits in
memory."""


@dataclass(frozen=True)
class Text:
    """A document held in memory: a row of a data set, or a small file."""

    name: str
    """Where it came from, for error messages."""
    text: str
    """The document."""

    def pieces(self) -> Iterator[str]:
        """The text, in one piece."""
        yield self.text

    def halves(self, val_fraction: float) -> tuple["Text", "Text"]:
        """Head and tail: the first 1 − val_fraction of the characters, and the rest."""
        cut = int(len(self.text) * (1 - val_fraction))
        return Text(self.name, self.text[:cut]), Text(self.name, self.text[cut:])


@dataclass(frozen=True)
class TextFile:
    """The bytes [start, end) of a UTF-8 text file as one document, read only when asked for."""

    path: Path
    start: int
    end: int

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about a megabyte. UsageError if it is not UTF-8 text or holds NUL
        bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        carry = ""
        with open_file(self.path) as file:
            file.seek(self.start)
            position = self.start
            while position < self.end:
                block = file.read(min(PIECE_BYTES, self.end - position))
                if not block:
                    raise UsageError(f"{self.path} became shorter while it was read; try again")
                if b"\0" in block:
                    raise _binary(self.path, f"a NUL byte at {position + block.index(0):,}")
                position += len(block)
                try:
                    text = carry + decoder.decode(block, final=position == self.end)
                except UnicodeDecodeError as error:
                    # `object` is the block, after what the decoder kept of the one before.
                    at = position - len(error.object) + error.start
                    what = f"byte 0x{error.object[error.start]:02x} at {at:,}"
                    raise _binary(self.path, what) from None
                if position == len(block):
                    text = text.removeprefix("\ufeff")
                cut = len(text) if position == self.end else text.rfind("\n") + 1 or len(text)
                carry = text[cut:]
                if cut:
                    yield text[:cut]

    def halves(self, val_fraction: float) -> tuple["TextFile", "TextFile"]:
        """Head and tail: the first 1 − val_fraction of the bytes, up to a whole character, and the
        rest."""
        cut = self.start + int((self.end - self.start) * (1 - val_fraction))
        with open_file(self.path) as file:
            file.seek(cut)
            following = file.read(4)
        cut += next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
        return TextFile(self.path, self.start, cut), TextFile(self.path, cut, self.end)


Document = Text | TextFile


def split(stream: Iterable[Document], val_fraction: float) -> Iterator[tuple[Split, Document]]:
    """Mark each document as training or validation, in one pass, without knowing how many there
    are.

    Each run of about 1/val_fraction documents gives one to validation, at a pseudo-random place of
    the run (a fixed function of its number), so the share is right to within one document and
    follows no period of the data. Two documents are enough for one each; a single one is cut into
    head (training) and tail (validation).
    """
    iterator = iter(stream)
    first, second = next(iterator, None), next(iterator, None)
    if first is None:
        return
    if second is None:
        head, tail = first.halves(val_fraction)
        yield "train", head
        yield "val", tail
        return
    share = Fraction(str(val_fraction))
    run, picked = -1, -1
    for number, document in enumerate(itertools.chain((first, second), iterator)):
        if int(number * share) != run:
            run = int(number * share)
            end = -int(-(run + 1) // share)  # the first document of the next run
            # The first run gives its second document, so that two documents make both splits.
            picked = 1 if run == 0 else number + _scramble(run) % (end - number)
        yield ("val" if number == picked else "train"), document


def open_file(path: Path) -> BinaryIO:
    """Open for reading; UsageError if that is not possible."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _scramble(value: int) -> int:
    """One integer through splitmix64 (Steele, Lea & Flood 2014)."""
    mask = (1 << 64) - 1
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def _binary(path: Path, what: str) -> UsageError:
    fix = "convert it, or choose files by a glob such as 'DIR/**/*.txt'"
    return UsageError(f"{path} is not UTF-8 text ({what}); {fix}")
