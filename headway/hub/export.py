"""Write a trained model as a folder that Hugging Face Transformers reads.

One tensor at a time goes from the checkpoint to its place in the folder, so that memory holds the
largest one and what it becomes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from headway.checkpoint import run_folder
from headway.checkpoint.checkpoint_dir import write_json
from headway.checkpoint.tensor_files import MAX_FILE_BYTES
from headway.checkpoint.tensor_reader import TensorReader
from headway.checkpoint.tensor_writer import write_tensors
from headway.config import Config, UsageError
from headway.data.tokenizer import Tokenizer
from headway.hub.export_tokenizer import special_ids, write_tokenizer
from headway.hub.families import headway
from headway.hub.load import find_trained, tokenizer_of
from headway.hub.model_card import model_card
from headway.hub.new_path import new_path

ExportDtype: TypeAlias = Literal["bfloat16", "float32", "float16"]
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_REMOTE = Path(__file__).parent / "remote"


class Exported(NamedTuple):
    """What was written."""

    model_type: str
    files: list[str]
    bytes: int
    left_out: list[str]
    """Tensors of the checkpoint that only training reads."""


class Source(NamedTuple):
    """A run to export."""

    run_dir: Path
    checkpoint: Path
    config: Config
    """With the vocabulary of the tokenizer: rows that only pad it are left out."""
    tokenizer: Tokenizer
    problems: list[str]
    """One sentence for each newer checkpoint that is damaged."""

    @property
    def max_len(self) -> int:
        """Longest context in tokens."""
        return self.config.model.max_len or self.config.data.seq_len


def open_source(path: Path) -> Source:
    """Return the run of a folder, or of one checkpoint in it. Raises UsageError without one."""
    run_dir, checkpoint, problems = find_trained(path)
    config = run_folder.read_config(run_dir)
    tokenizer = tokenizer_of(run_dir, config)
    model = replace(config.model, vocab_size=tokenizer.vocab_size)
    return Source(run_dir, checkpoint, replace(config, model=model), tokenizer, problems)


def export_hf(
    source: Source, to: Path, dtype: ExportDtype, max_file_bytes: int = MAX_FILE_BYTES
) -> Exported:
    """Write the folder `to`, complete or not at all, its weights in files of about `max_file_bytes`
    at most.

    Raises: UsageError where `to` exists or cannot be written, and for a model that the family
    cannot express."""
    config = _config(source, dtype)
    with new_path(to) as folder, TensorReader(source.checkpoint, "model") as reader:
        folder.mkdir()
        weights = Weights(reader, source, _DTYPES[dtype])
        write_tensors(folder, "model", weights.planned(), weights.read, max_file_bytes)
        write_json(folder / "config.json", config)
        write_tokenizer(folder, source.tokenizer, source.max_len)
        for path in _REMOTE.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        card = model_card(source.run_dir, source.config, "headway", dtype)
        (folder / "README.md").write_text(card, "utf-8")
    files = sorted(path for path in to.iterdir())
    total = sum(path.stat().st_size for path in files)
    return Exported("headway", [path.name for path in files], total, weights.left_out)


class Weights:
    """The tensors of a folder, each read and converted when it is asked for."""

    def __init__(self, reader: TensorReader, source: Source, dtype: torch.dtype) -> None:
        model, stored = source.config.model, set(reader.names())
        self._reader, self._dtype, self._vocab_size = reader, dtype, model.vocab_size
        self._rows = {row.theirs: row for row in headway.rows(model) if row.ours in stored}
        self.left_out = sorted(stored - {row.ours for row in self._rows.values()})
        other = [name for name in self.left_out if not name.endswith("router.w_noise_HEL")]
        if other:
            raise UsageError(
                f"{source.checkpoint.name}: {other[0]} has no place in a headway folder "
                f"({len(other)} such tensors); the model has modules of its own"
            )

    def read(self, name: str) -> Tensor:
        """Return a tensor of the folder."""
        return self._convert(name, self._reader.read(self._rows[name].ours))

    def planned(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device."""
        shapes = {name: self._reader.shape(row.ours) for name, row in self._rows.items()}
        return {
            name: self._convert(name, torch.empty(shape, device="meta"))
            for name, shape in shapes.items()
        }

    def _convert(self, name: str, w: Tensor) -> Tensor:
        row = self._rows[name]
        if row.ours in ("embed.weight", "head.weight"):
            w = w[: self._vocab_size]
        wide = "norm" in name or ".router." in name
        return row.to_theirs(w).to(torch.float32 if wide else self._dtype)


def _config(source: Source, dtype: ExportDtype) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["HeadwayForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_headway.HeadwayConfig",
            "AutoModel": "modeling_headway.HeadwayModel",
            "AutoModelForCausalLM": "modeling_headway.HeadwayForCausalLM",
        },
        **headway.to_config(source.config.model),
        "max_position_embeddings": source.max_len,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **special_ids(source.tokenizer),
    }
