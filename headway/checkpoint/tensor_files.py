"""Safetensors files that several ranks write together and of which each reads what it needs.

The header says where each tensor begins, so every rank writes its parts in their places of one file
at once: nothing is gathered, nothing is written twice, and the bytes are those that
`safetensors.torch.save_file` writes in a single process. A file that would grow too large is
several, with the index that Hugging Face tools read.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from headway.parallel.local_shards import LocalShard

LARGEST = 4 << 30
"""Bytes of tensors in one file; a larger tensor has a file to itself."""

# In the order in which safetensors sorts them (last first, so that all stay aligned).
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: i for i, dtype in enumerate(_NAMES)}


@dataclass(frozen=True)
class TensorFile:
    """One file to be written: what lies where in it."""

    name: str
    header: bytes
    begins: dict[str, int]
    """Position of each tensor, in bytes from the start of the file."""
    size: int

    def create(self, folder: Path) -> None:
        """The file at its full size, without its tensors."""
        with (folder / self.name).open("xb") as file:
            file.write(self.header)
            file.truncate(self.size)

    def write(self, folder: Path, pieces: dict[str, LocalShard]) -> None:
        """The parts of this rank, synced to disk."""
        handle = os.open(folder / self.name, os.O_WRONLY)
        try:
            for name, begin in self.begins.items():
                if pieces[name].writes:
                    for offset, data in _runs(pieces[name]):
                        _write_at(handle, begin + offset, data)
            os.fsync(handle)
        finally:
            os.close(handle)


def plan(stem: str, pieces: dict[str, LocalShard], largest: int = LARGEST) -> list[TensorFile]:
    """The files `stem.safetensors`, or `stem-00001-of-00003.safetensors` and so on. They follow
    from names, dtypes and whole shapes alone: the same on every rank of every mesh."""
    groups: list[list[str]] = [[]]
    room = largest
    for name, part in pieces.items():
        n_bytes = _bytes(part)
        if groups[-1] and n_bytes > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= n_bytes
    n = len(groups)
    names = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    names = names if n > 1 else [f"{stem}.safetensors"]
    return [_layout(name, {k: pieces[k] for k in g}) for name, g in zip(names, groups, strict=True)]


def index(files: list[TensorFile]) -> dict[str, Any]:
    """Contents of `stem.safetensors.index.json`, for several files."""
    total = sum(file.size - len(file.header) for file in files)
    places = {name: file.name for file in files for name in file.begins}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


class TensorReader:
    """Tensors of a file or of several with an index, read one by one or in part. A context."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._stack = ExitStack()
        listed = folder / f"{stem}.safetensors.index.json"
        names = [f"{stem}.safetensors"]
        if listed.exists():
            names = sorted(set(json.loads(listed.read_text())["weight_map"].values()))
        files = [
            self._stack.enter_context(safe_open(folder / name, framework="pt")) for name in names
        ]
        self._places = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._places[name].get_slice(name).get_shape())

    def read(self, name: str, window: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it that `window` names: only that is read from disk."""
        file = self._places[name]
        return file.get_slice(name)[window] if window else file.get_tensor(name)

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _layout(name: str, pieces: dict[str, LocalShard]) -> TensorFile:
    ordered = sorted(pieces, key=lambda key: (-_ORDER[pieces[key].tensor.dtype], key))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for key in ordered:
        part, end = pieces[key], position + _bytes(pieces[key])
        entries[key] = {
            "dtype": _NAMES[part.tensor.dtype],
            "shape": part.shape,
            "data_offsets": (position, end),
        }
        begins[key], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begins = {key: len(header) + begin for key, begin in begins.items()}
    return TensorFile(name, header, begins, len(header) + position)


def _bytes(part: LocalShard) -> int:
    return math.prod(part.shape) * part.tensor.element_size()


def _runs(part: LocalShard) -> Iterator[tuple[int, memoryview]]:
    """(byte offset in the whole tensor, bytes) of each stretch of this part that is contiguous
    there."""
    local = part.tensor.detach().to("cpu").contiguous()
    if not local.numel():
        return
    data = local.reshape(-1).view(torch.uint8).numpy().data
    split = [
        d for d, (n, whole) in enumerate(zip(local.shape, part.shape, strict=True)) if n < whole
    ]
    last = max(split, default=0)
    strides = [math.prod(part.shape[d + 1 :]) for d in range(local.dim())]
    run = math.prod(local.shape[last:]) * local.element_size()
    for i, leading in enumerate(_indices(local.shape[:last])):
        place = (*leading, *([0] * (local.dim() - last)))
        elements = sum(
            (at + start) * stride
            for at, start, stride in zip(place, part.start, strides, strict=True)
        )
        yield elements * local.element_size(), data[i * run : (i + 1) * run]


def _indices(shape: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """All indices of a shape, the last dim fastest."""
    found: list[tuple[int, ...]] = [()]
    for n in shape:
        found = [(*index, i) for index in found for i in range(n)]
    return iter(found)


def _write_at(handle: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(handle, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written
