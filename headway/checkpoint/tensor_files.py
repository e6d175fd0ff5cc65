"""Safetensors files that several ranks write together.

The header says where each tensor begins, so every rank writes its shards to their places in one
file at the same time: nothing is gathered, nothing is written twice, and the bytes are those that
`safetensors.torch.save_file` writes in a single process. Tensors that do not fit into one file are
written to several, with the index that Hugging Face tools read."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headway.parallel.local_shards import LocalShard

MAX_FILE_BYTES = 4 << 30
"""Bytes of tensors in one file; a larger tensor gets a file of its own."""

# In the order in which safetensors sorts them (last first, so that all stay aligned).
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: i for i, dtype in enumerate(_NAMES)}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""Name of a dtype in a header → dtype."""


@dataclass(frozen=True)
class TensorFile:
    """One file to be written: its header and the positions of its tensors."""

    name: str
    header: bytes
    begins: dict[str, int]
    """Position of each tensor, in bytes from the start of the file."""
    size: int

    def create(self, folder: Path) -> None:
        """Create the file at its full size, without its tensors."""
        with (folder / self.name).open("xb") as file:
            file.write(self.header)
            file.truncate(self.size)

    def write(self, folder: Path, shards: Mapping[str, Iterable[LocalShard]]) -> None:
        """Write the shards of each tensor that this rank has and sync them to disk."""
        with (folder / self.name).open("r+b", buffering=0) as file:
            for name in self.begins:
                for shard in shards[name]:
                    if shard.writes:
                        self.write_one(file.fileno(), name, shard)
            os.fsync(file.fileno())

    def write_one(self, handle: int, name: str, shard: LocalShard) -> None:
        """Write one shard to its place in the open file."""
        for offset, data in _runs(shard):
            _write_at(handle, self.begins[name] + offset, data)


def plan_files(
    stem: str, shards: dict[str, LocalShard], max_bytes: int = MAX_FILE_BYTES
) -> list[TensorFile]:
    """Return the files `stem.safetensors`, or `stem-00001-of-00003.safetensors` and so on. They
    depend on names, dtypes and full shapes only: the same on every rank of every mesh."""
    groups: list[list[str]] = [[]]
    room = max_bytes
    for name, shard in shards.items():
        n_bytes = _bytes(shard)
        if groups[-1] and n_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= n_bytes
    n = len(groups)
    files = []
    for i, group in enumerate(groups, 1):
        name = f"{stem}-{i:05d}-of-{n:05d}.safetensors" if n > 1 else f"{stem}.safetensors"
        files.append(_plan_file(name, {key: shards[key] for key in group}))
    return files


def index_of(files: list[TensorFile]) -> dict[str, Any]:
    """Return the contents of `stem.safetensors.index.json`, for several files."""
    total = sum(file.size - len(file.header) for file in files)
    places = {name: file.name for file in files for name in file.begins}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _plan_file(name: str, shards: dict[str, LocalShard]) -> TensorFile:
    ordered = sorted(shards, key=lambda key: (-_ORDER[shards[key].tensor.dtype], key))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for key in ordered:
        shard, end = shards[key], position + _bytes(shards[key])
        entries[key] = {
            "dtype": _NAMES[shard.tensor.dtype],
            "shape": shard.shape,
            "data_offsets": (position, end),
        }
        begins[key], position = position, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begins = {key: len(header) + begin for key, begin in begins.items()}
    return TensorFile(name, header, begins, len(header) + position)


def _bytes(shard: LocalShard) -> int:
    return math.prod(shard.shape) * shard.tensor.element_size()


def _runs(shard: LocalShard) -> Iterator[tuple[int, memoryview]]:
    """Yield (byte offset in the full tensor, bytes) of each run that is contiguous there."""
    local = shard.tensor.detach().to("cpu").contiguous()
    if not local.numel():
        return
    data = local.reshape(-1).view(torch.uint8).numpy().data
    split = [d for d in range(local.dim()) if local.shape[d] < shard.shape[d]]
    last = max(split, default=0)
    strides = [math.prod(shard.shape[d + 1 :]) for d in range(local.dim())]
    run = math.prod(local.shape[last:]) * local.element_size()
    for i, leading in enumerate(itertools.product(*map(range, local.shape[:last]))):
        place = (*leading, *([0] * (local.dim() - last)))
        elements = sum((place[d] + shard.start[d]) * strides[d] for d in range(local.dim()))
        yield elements * local.element_size(), data[i * run : (i + 1) * run]


def _write_at(handle: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(handle, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written
