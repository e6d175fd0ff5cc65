"""Read safetensors, whole or in part: of each tensor only the bytes that are asked for are mapped,
and no longer than the call, so that memory holds what the caller keeps and one tensor more."""

import json
import math
import mmap
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from headway.checkpoint.tensor_files import DTYPES
from headway.config import UsageError

_LONGEST_HEADER = 100_000_000
"""Bytes; the bound of the safetensors library."""


class _Entry(NamedTuple):
    """One tensor of a file."""

    file: BinaryIO
    begin: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorReader:
    """Context that reads the tensors of `STEM.safetensors`, or of the files that
    `STEM.safetensors.index.json` names.

    Raises: UsageError for a file that is missing, truncated or no safetensors file, and for an
    index that is not that of its files."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        index = folder / f"{stem}.safetensors.index.json"
        places = _weight_map(index) if index.exists() else {}
        with ExitStack() as files:
            for name in sorted(set(places.values())) or [f"{stem}.safetensors"]:
                self._open(folder / name, files)
            for tensor, name in places.items():
                if tensor not in self._entries:
                    raise UsageError(f"{index} puts {tensor} into {name}, which does not hold it")
            self._files = files.pop_all()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the full tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is stored."""
        return self._entries[name].dtype

    def read(
        self, name: str, slices: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor, or the part of it that `slices` select, on the CPU in `dtype`; None: as
        it is stored."""
        file, begin, stored, shape = self._entries[name]
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype or stored)[slices]
        n_bytes = math.prod(shape) * stored.itemsize
        page = begin % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(
            file.fileno(), n_bytes + page, access=mmap.ACCESS_COPY, offset=begin - page
        )
        mapped = torch.frombuffer(view, dtype=torch.uint8, count=n_bytes, offset=page)
        return mapped.view(stored).view(shape)[slices].to(dtype or stored, copy=True)

    def _open(self, path: Path, files: ExitStack) -> None:
        """Check one file and list its tensors."""
        try:
            file = files.enter_context(path.open("rb"))
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"{size} bytes cannot hold its header of {length}")
            header = json.loads(file.read(length))
            self._list(file, header, 8 + length, size)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{path} is damaged: {reason}; get it again") from None

    def _list(self, file: BinaryIO, header: dict[str, Any], first: int, size: int) -> None:
        header.pop("__metadata__", None)
        position = first
        for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (first + offset for offset in spec["data_offsets"])
            shape = tuple(spec["shape"])
            if spec["dtype"] not in DTYPES:
                raise ValueError(f"{name} has the dtype {spec['dtype']!r}, which is not known")
            dtype = DTYPES[spec["dtype"]]
            if min(shape, default=0) < 0:
                raise ValueError(f"{name} has the shape {list(shape)}, which is negative")
            if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the bytes of {name} are not those of its shape {list(shape)}")
            if name in self._entries:
                raise ValueError(f"{name} is in two files")
            self._entries[name] = _Entry(file, begin, dtype, shape)
            position = end
        if position != size:
            raise ValueError(f"it has {size} bytes, and its header describes {position}")


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor → file name."""
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        if any(Path(name).name != name for name in places.values()):
            raise ValueError("a file name has a folder in it")
    except OSError as error:
        raise UsageError(f"cannot read {index}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of tensors ({error}); get it again") from None
    return places
