"""Write safetensors in one process, one tensor at a time."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from headway.checkpoint.checkpoint_dir import write_json
from headway.checkpoint.tensor_files import MAX_FILE_BYTES, index_of, plan_files
from headway.parallel.local_shards import LocalShard


def write_tensors(
    folder: Path,
    stem: str,
    planned: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `STEM.safetensors` into `folder`, or several files with an index.

    Args:
        planned: dtypes and shapes by name; tensors of the meta device do.
        read: returns the values of one of them; it is called once for each, and what it returned
            is dropped before the next call.
        max_bytes: of the tensors in one file; a larger tensor gets a file of its own.
    Raises: OSError, as on a full disk."""
    files = plan_files(stem, {name: _whole(tensor) for name, tensor in planned.items()}, max_bytes)
    for file in files:
        file.create(folder)
        with (folder / file.name).open("r+b", buffering=0) as opened:
            for name in file.begins:
                file.write_one(opened.fileno(), name, _whole(read(name)))
            os.fsync(opened.fileno())
    if len(files) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", index_of(files))


def _whole(tensor: Tensor) -> LocalShard:
    return LocalShard(tensor, tuple(tensor.shape), (0,) * tensor.dim(), True)
