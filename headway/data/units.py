"""A source is cut into units of about equal size, which several processes read and tokenise. The
cuts follow from the files alone, so the tokens are the same for any number of processes."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from headway.data import document
from headway.data import records as rows
from headway.data.corpus import files
from headway.data.document import Bad, Text, TextFile, TextPiece, split
from headway.data.files import BadData, compressed, counted, kind_of, open_file

Kind = Literal["text", "JSON lines", "table", "parquet", "library", "data set"]

_Kinded = tuple[Path, Kind, int]  # bytes

UNIT_BYTES = (4 << 20, 64 << 20)
"""Least and most bytes of a unit, but for the last one and for what cannot be cut."""
UNITS = 64
"""Units that a source has at least, as long as they are not smaller than that."""
FILE_BYTES = 16 << 10
"""To open a file takes about as long as to tokenise so many bytes."""
UNPACKED = 4
"""Bytes that a packed file is taken to hold per byte of its own."""
MOST_UNPACKED = 16
"""Units that a packed file is cut into at most, since each unpacks all that lies before it."""


@dataclass(frozen=True)
class Span:
    """A stretch of one file: the rows that begin in it, or the pieces of text that end in it."""

    path: str
    """A file, or the whole name of a data set."""
    kind: Kind
    start: int = 0
    """In bytes, unpacked; in row groups of parquet."""
    end: int | None = None
    """None is the end of the file."""
    document: tuple[int, int | None] = (0, None)
    """Of text: the bytes of the document that the span belongs to."""


@dataclass
class Unit:
    """What one process reads and tokenises at once."""

    spans: list[Span] = field(default_factory=list)
    bytes: int = 0
    """About, for progress; 0 where nobody knows."""
    halve: float = 0.0
    """val_fraction, for a unit that is the whole source: if it has a single row, that is cut into
    training and validation. Else 0."""


def plan(spec: str, val_fraction: float) -> tuple[list[Unit], str]:
    """Return the units of a source and a sentence on its files; UsageError if there are none."""
    if spec.startswith("hf:"):
        return [Unit([Span(spec, "data set")], 0, val_fraction)], "a data set"
    source = files(spec)
    there: list[_Kinded] = [(path, _kind(path, spec), size) for path, size, _ in source.files]
    said = _said(there, source.left_out)
    there = [one for one in there if one[2]]
    cost = sum(_unpacked(path, size) + FILE_BYTES for path, _, size in there)
    size = min(max(cost // UNITS, UNIT_BYTES[0]), UNIT_BYTES[1])
    size -= size % document.PIECE_BYTES
    lone = _lone(there)
    if isinstance(lone, TextFile):  # two documents, of which one is kept for validation
        cut = [part for half in lone.halves(val_fraction) for part in _cut_text(half, size)]
    elif lone:
        return [Unit([Span(str(path), kind) for path, kind, _ in there], cost, val_fraction)], said
    else:
        cut = [part for path, kind, bytes in there for part in _cut(path, kind, bytes, size)]
    units: list[Unit] = []
    for span, bytes in cut:
        if not units or units[-1].bytes >= size:
            units.append(Unit())
        units[-1].spans.append(span)
        units[-1].bytes += bytes + FILE_BYTES
    return units, said


def read(unit: Unit, skip_bad: bool = False) -> Iterator[TextPiece | Bad]:
    """Yield the documents of a unit in pieces, without empty ones. What cannot be read raises
    BadData, or with `skip_bad` becomes a `Bad`, which may follow pieces of the same document."""
    for one in _halved(unit) if unit.halve else _all(unit):
        if isinstance(one, Bad) and not skip_bad:
            raise BadData(f"{one.why} (data.skip_bad leaves it out)")
        yield one


def train_texts(
    sources: Sequence[str], val_fraction: float, skip_bad: bool = False
) -> Iterator[str]:
    """Yield the training text of sources in pieces: a tokenizer never sees validation text."""
    for spec in sources:
        pieces = (one for unit in plan(spec, val_fraction)[0] for one in read(unit, skip_bad))
        pieces = (one for one in pieces if isinstance(one, TextPiece) or one.numbered)
        for part, of_document in split(_documents(pieces), val_fraction):
            if part == "train":
                yield from (one.text for one in of_document if isinstance(one, TextPiece))


def _documents(pieces: Iterator[TextPiece | Bad]) -> Iterator[Iterator[TextPiece | Bad]]:
    """Yield the pieces of each document, to be read before the next document is asked for."""
    number = itertools.count()
    current = 0

    def numbered(one: TextPiece | Bad) -> int:
        nonlocal current
        current = next(number) if one.begins else current
        return current

    yield from (group for _, group in itertools.groupby(pieces, numbered))


def _all(unit: Unit) -> Iterator[TextPiece | Bad]:
    for span in unit.spans:
        is_text = span.kind == "text"
        begins = not is_text or span.start == span.document[0]
        try:
            if is_text:
                text = TextFile(Path(span.path), *span.document)
                for piece in text.pieces(span.start, span.end):
                    begins = False
                    yield piece
            else:
                for row in _rows(span):
                    yield from [row] if isinstance(row, Bad) else row.pieces()
        except BadData as error:
            yield Bad(str(error), begins, numbered=is_text, file=not is_text)


def _halved(unit: Unit) -> Iterator[TextPiece | Bad]:
    """Yield the documents of a unit of rows that may have a single one, which gives two halves."""
    first_rows = list(itertools.islice(_texts(unit.spans), 2))
    if len(first_rows) == 1:
        for half in first_rows[0].halves(unit.halve):
            yield from half.pieces()
        yield from (one for one in _all(unit) if isinstance(one, Bad))
    else:
        yield from _all(unit)


def _texts(spans: Sequence[Span]) -> Iterator[Text]:
    """Yield the rows of files that can be read."""
    for span in spans:
        with contextlib.suppress(BadData):
            yield from (row for row in _rows(span) if isinstance(row, Text))


def _rows(span: Span) -> Iterator[Text | Bad]:
    path = Path(span.path)
    match span.kind:
        case "JSON lines":
            texts = rows.jsonl(path, span.start, span.end)
        case "table":
            texts = rows.table(path)
        case "parquet":
            texts = rows.parquet(path, span.start, span.end)
        case "data set":
            texts = rows.hugging_face(span.path)
        case _:
            texts = _library_file(path)
    yield from (row for row in texts if isinstance(row, Bad) or row.text)


def _library_file(path: Path) -> Iterator[Text]:
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return  # a few library files are in another encoding, on purpose
    if "\0" not in text:
        yield Text(str(path), text)


def _kind(path: Path, spec: str) -> Kind:
    match kind_of(path):
        case ".jsonl" | ".ndjson":
            return "JSON lines"
        case ".json" if rows.is_json_lines(path):
            return "JSON lines"
        case ".csv" | ".tsv":
            return "table"
        case ".parquet":
            return "parquet"
        case ".py" if spec == "stdlib" or spec.startswith("set:python"):
            return "library"
        case _:
            return "text"


def _lone(there: list[_Kinded]) -> TextFile | Text | None:
    """Return the only document of a source, or None unless it has exactly one that can be read."""
    documents: list[TextFile | Text] = []
    for path, kind, size in there:
        if kind == "text":
            documents.append(TextFile(path, 0, None if compressed(path) else size))
        else:
            documents += itertools.islice(_texts([Span(str(path), kind)]), 2)
        if len(documents) > 1:
            return None
    return documents[0] if documents else None


def _cut(path: Path, kind: Kind, bytes: int, size: int) -> Iterator[tuple[Span, int]]:
    """Return spans of a file, each with about how many bytes it has."""
    unpacked = _unpacked(path, bytes)
    if kind == "text":
        yield from _cut_text(TextFile(path, 0, None if compressed(path) else bytes), size, unpacked)
    elif kind == "JSON lines":
        for start, end in _edges(0, None if compressed(path) else bytes, size, unpacked):
            yield Span(str(path), kind, start, end), (end or max(unpacked, start)) - start
    elif kind == "parquet" and bytes > size:
        start = held = 0
        groups = rows.row_groups(path)
        for number, group in enumerate(groups, 1):
            held += group
            if held >= size or number == len(groups):
                yield Span(str(path), kind, start, number), held
                start, held = number, 0
        if not groups:
            yield Span(str(path), kind), bytes  # reading it says why
    else:
        yield Span(str(path), kind), unpacked


def _cut_text(text: TextFile, size: int, unpacked: int = 0) -> Iterator[tuple[Span, int]]:
    path, whole = str(text.path), (text.start, text.end)
    for start, end in _edges(*whole, size, unpacked):
        yield Span(path, "text", start, end, whole), (end or max(unpacked, start)) - start


def _edges(
    start: int, end: int | None, size: int, unpacked: int
) -> Iterator[tuple[int, int | None]]:
    """Return the cuts of a file, at multiples of `size` from its start; of a packed file, whose end
    is unknown, at so many places that most units have something."""
    if end is None:
        pieces = -(-unpacked // MOST_UNPACKED) // document.PIECE_BYTES
        size = max(size, (pieces + 1) * document.PIECE_BYTES)
    last = start + unpacked if end is None else end
    while last - start > size:
        yield start, start + size
        start += size
    if start != end:
        yield start, end


def _unpacked(path: Path, size: int) -> int:
    return size * UNPACKED if compressed(path) else size


def _label(path: Path, kind: Kind) -> str:
    suffix = "".join(path.suffixes[-2:] if compressed(path) else path.suffixes[-1:])
    return f".json of {kind}" if suffix == ".json" and kind != "text" else suffix or "no suffix"


def _said(there: list[_Kinded], left_out: Counter[str]) -> str:
    kinds = Counter(_label(path, kind) for path, kind, size in there if size)
    if len(kinds) > 6:
        rest = Counter({"others": sum(n for _, n in kinds.most_common()[5:])})
        kinds = Counter(dict(kinds.most_common(5))) + rest
    empty = sum(not size for _, _, size in there)
    left = left_out + Counter({"empty files": empty})
    files = sum(kinds.values())
    listed = ", ".join(f"{n:,} {suffix}" for suffix, n in kinds.items())
    said = f"{files:,} file{'s'[: files != 1]} ({listed})"
    return f"{said}; left out: {counted(left)}" if +left else said
