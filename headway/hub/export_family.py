"""Write a model as one of a known family: the tables of import, read backwards."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.checkpoint.checkpoint_dir import write_json
from headway.checkpoint.load import Weights
from headway.checkpoint.tensor_files import MAX_FILE_BYTES
from headway.checkpoint.tensor_writer import write_tensors
from headway.config import ModelConfig, UsageError
from headway.hub.family import Family
from headway.hub.layout import Row, Shape

_PADDED = ("embed.weight", "head.weight")
"""Tensors of which rows may only pad the vocabulary."""


def export_family(
    config: ModelConfig,
    weights: Weights,
    family: Family,
    dtype: torch.dtype,
    folder: Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[str]:
    """Write config.json and safetensors into `folder`; return the tensors that only training reads,
    which are left out.

    Args:
        config: of the model, with `max_len` set; `vocab_size` may be smaller than that of the
            weights, of which further rows are cut.
        weights: in our names.
        dtype: of the weights that the family does not keep in float32.
    Raises: UsageError where no model of the family computes the same."""
    tensors = FamilyWeights(config, weights, family, dtype)
    write_tensors(folder, "model", tensors.planned(), tensors.read, max_file_bytes)
    write_json(folder / "config.json", family_config(config, family, dtype))
    return tensors.left_out


def family_config(config: ModelConfig, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json, in the spellings of Transformers 4 and 5. Raises UsageError where the
    family lacks an option of the model."""
    assert config.max_len > 0, "the context length is resolved before a model is exported"
    if differences := family.differences(config):
        raise UsageError(f"no {family.name} computes this model: {differences[0]}")
    name = str(dtype).removeprefix("torch.")
    return {**family.write(config), "torch_dtype": name, "dtype": name}


class FamilyWeights:
    """The tensors of a family, each read and laid out when it is asked for."""

    def __init__(
        self, config: ModelConfig, weights: Weights, family: Family, dtype: torch.dtype
    ) -> None:
        self._weights, self._dtype, self._vocab_size = weights, dtype, config.vocab_size
        self._float32 = re.compile(family.float32)
        self._rows = {row.theirs: row for row in family.rows(config, False)}
        self.left_out = sorted(set(weights.names()) - {row.ours for row in self._rows.values()})
        """Our tensors that have no place."""
        for name in self.left_out:
            if name.endswith("router.bias_HE") and not weights.read(name).any():
                continue  # it selects as no bias does
            if not name.endswith("router.w_noise_HEL"):
                raise UsageError(f"{name} is not 0, and {family.name} has no tensor for it")

    def planned(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device."""
        return {
            name: torch.empty(row.shape(self._shape(row)), dtype=self._stored(row), device="meta")
            for name, row in self._rows.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor of the folder."""
        row, shape = self._rows[name], self._shape(self._rows[name])
        part = self._weights.read(row.ours, row.region(shape), self._stored(row))
        return row.write(part, shape).contiguous()

    def _shape(self, row: Row) -> Shape:
        """Return the shape of our tensor, without rows that pad the vocabulary."""
        rows, *rest = self._weights.shape(row.ours)
        return (self._vocab_size if row.ours in _PADDED else rows, *rest)

    def _stored(self, row: Row) -> torch.dtype:
        return torch.float32 if self._float32.search(row.ours) else self._dtype
