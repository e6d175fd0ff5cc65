"""A Hugging Face folder: config.json, safetensors in one file or several, files of a tokenizer.

Nothing of it is run: JSON and tensors are read, a folder's own Python code never is."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.checkpoint.tensor_reader import TensorReader
from headway.config import Config, DataConfig, ModelConfig, UsageError
from headway.hub.dequantise import dequantised
from headway.hub.families import find_family
from headway.hub.family import lookup
from headway.hub.layout import Region, Row, Shape
from headway.model.transformer import Transformer

_SEQ_LEN = 1024
"""Most tokens of a window in which `headway eval` reads a model that was trained elsewhere."""
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_hub_folder(path: Path) -> bool:
    """Return whether `path` is meant as a Hugging Face folder and not as a run or a checkpoint."""
    ours = ("run.json", "manifest.json")
    return (path / "config.json").is_file() and not any((path / name).exists() for name in ours)


class HubFolder:
    """Context with an open folder: the model that it describes, and its tensors as ours.

    Every tensor is accounted for before one is read. Raises: UsageError for a folder that holds no
    model, or none that we know; for tensors that are missing, left over, wrongly shaped or wrongly
    typed, which it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values = read_json(folder / "config.json")
        self.family = find_family(self.values.get("model_type"))
        self.config = self.family.read(self.values)
        self.config.check()
        self._reader = dequantised(_open(folder), self.values.get("quantization_config"))
        self._rows: dict[str, list[Row]] = {}
        self._shapes = _shapes(self.config)
        try:
            self.skipped = self._match()
        except UsageError:
            self._reader.__exit__()
            raise

    def __enter__(self) -> "HubFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def run_config(self, run_dir: Path) -> Config:
        """Return the config of a run with this model, what verbs start from; `run_dir` will hold
        the tokenizer."""
        seq_len, tokenizer = min(self.config.max_len, _SEQ_LEN), str(run_dir.absolute())
        data = DataConfig(tokenizer=tokenizer, seq_len=seq_len, micro_batch_size=1)
        return Config(recipe=self.family.name, model=self.config, data=data)

    @property
    def n_read(self) -> int:
        """Return how many of the folder's tensors the model is made of."""
        return sum(map(len, self._rows.values()))

    def names(self) -> list[str]:
        """Return the names of our tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        """Return the shape of one of our tensors."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the narrowest dtype that holds all parts of one of our tensors."""
        dtypes = {self._reader.dtype(row.theirs) for row in self._rows.get(name, [])}
        if len(dtypes) == 1:
            return dtypes.pop()
        return torch.float32

    def parts(
        self, name: str, dtype: torch.dtype | None = None, slices: Region = ()
    ) -> Iterator[tuple[Region, Tensor]]:
        """Yield the parts of one of our tensors, one at a time: where each lies, and its values;
        only those that share values with `slices` of the tensor."""
        shape, dtype = self._shapes[name], dtype or self.dtype(name)
        for row in self._rows.get(name, []):
            for theirs, region, reduced in row.pieces(shape):
                if _overlap(region, slices, shape):
                    part = self._reader.read(row.theirs, theirs, dtype)
                    yield region, row.read(part, reduced)
        if name not in self._rows:  # a buffer that the family has not
            yield tuple(slice(0, n) for n in shape), torch.zeros(shape, dtype=dtype)

    def read(
        self, name: str, slices: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return one of our tensors, or the part of it that `slices` select."""
        rows = self._rows.get(name, [])
        if len(rows) == 1 and not rows[0].dims:  # as it is, without a second copy
            return self._reader.read(rows[0].theirs, slices, dtype)
        whole = torch.empty(self._shapes[name], dtype=dtype or self.dtype(name))
        for region, part in self.parts(name, dtype, slices):
            whole[region] = part
        return whole[slices] if slices else whole

    def _match(self) -> tuple[str, ...]:
        """Find a row for every tensor of the folder and every parameter of the model; return the
        tensors of layers for multi-token prediction, which are left out."""
        present = set(self._reader.names())
        fused = any(name.endswith("experts.gate_up_proj") for name in present)
        rows = list(self.family.rows(self.config, fused))
        if self.config.tied and {_HEAD, _EMBEDDING} <= present:
            self._check_tied()
            present.remove(_HEAD)
        expected = {row.theirs for row in rows}
        skipped = {name for name in present - expected if self._predicts_ahead(name)}
        problems = [
            _named("missing", sorted(expected - present)),
            _named("left over", sorted(present - expected - skipped)),
        ]
        rows = [row for row in rows if row.theirs in present]
        differing, wrongly_typed = [], []
        for row in rows:
            shape, dtype = self._reader.shape(row.theirs), self._reader.dtype(row.theirs)
            if shape != (wanted := row.shape(self._shapes[row.ours])):
                differing.append(
                    f"{row.theirs} ({list(shape)} in the file, {list(wanted)} by config.json)"
                )
            if dtype not in _FLOATS:
                wrongly_typed.append(f"{row.theirs} ({str(dtype).removeprefix('torch.')})")
        problems += [_named("wrongly shaped", differing), _named("wrongly typed", wrongly_typed)]
        if any(problems):
            raise UsageError(f"{self.folder}: {'; '.join(filter(None, problems))}")
        rows.sort(key=lambda row: row.ours)
        self._rows = {name: list(group) for name, group in groupby(rows, lambda row: row.ours)}
        return tuple(sorted(skipped))

    def _check_tied(self) -> None:
        """Raise UsageError where a folder holds a head beside the embedding to which it is tied,
        and they differ."""
        if not torch.equal(self._reader.read(_HEAD), self._reader.read(_EMBEDDING)):
            raise UsageError(
                f"{self.folder} has tie_word_embeddings=True in config.json, and {_HEAD} differs "
                f"from {_EMBEDDING}; set it to false"
            )

    def _predicts_ahead(self, name: str) -> bool:
        """Return whether a tensor is of a layer after the last, for multi-token prediction."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        ahead = lookup(self.values, "num_nextn_predict_layers num_mtp_layers", 0)
        first = self.config.n_layers
        return layer is not None and first <= int(layer[1]) < first + ahead


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; {} without the file. Raises UsageError for another one."""
    try:
        values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if isinstance(values, dict):
            return values
        problem = "not an object"
    except OSError as error:
        problem = str(error.strerror)
    except ValueError as error:
        problem = str(error)
    raise UsageError(f"{path} cannot be read ({problem}); restore it")


def _open(folder: Path) -> TensorReader:
    if any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return TensorReader(folder, "model")
    others = [p.name for end in ("bin", "pt", "pth") for p in sorted(folder.glob(f"*.{end}"))]
    if others:
        raise UsageError(
            f"{folder} holds {others[0]}, a pickle, which is not opened since it can run code; "
            "save the model as safetensors"
        )
    raise UsageError(f"{folder} holds no model.safetensors and no index of several")


def _overlap(region: Region, slices: Region, shape: Shape) -> bool:
    """Return whether two parts of a tensor share values; no `slices` are all of it."""
    ranges = zip(region, slices, shape, strict=False)
    ends = ((a.indices(n), b.indices(n)) for a, b, n in ranges)
    return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in ends)


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def _named(problem: str, names: Iterable[str]) -> str:
    """Return the first three of `names` and their number, as a part of a message; "" for none."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {problem}: {', '.join(names[:3])}{more}" if names else ""
