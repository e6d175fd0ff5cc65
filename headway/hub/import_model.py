"""Make a run folder of a Hugging Face folder: `headway import`. Tensors are read, laid out and
written one at a time; what is on disk stays in its dtype."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from headway.checkpoint import checkpoint_dir
from headway.checkpoint.checkpoint_dir import CheckpointError
from headway.checkpoint.save import plan_weights, write_checkpoint
from headway.config import Config, UsageError
from headway.hub.folder import HubFolder, read_json
from headway.hub.memory import peak_memory
from headway.hub.new_path import new_path
from headway.hub.tokenizer_files import FILES, end_of_text, load_hub_tokenizer
from headway.model.costs import Workload, active_parameters, costs_of, parameters, total
from headway.model.transformer import Transformer


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    family: str
    parameters: int
    active_parameters: int
    """Those that a token uses."""
    tensors_read: int
    skipped: tuple[str, ...]
    """Tensors of layers for multi-token prediction, which are left out."""
    peak_memory_bytes: int
    """Most resident memory while tensors were read and written, above that before."""
    checkpoint: str


def import_model(source: Path, out: Path) -> Imported:
    """Write the run folder `out` of the Hugging Face folder `source`. It is complete or absent.

    Raises: UsageError as `HubFolder`; where `out` exists, lies in `source` or cannot be written."""
    _check_out(source, out)
    with peak_memory() as memory, HubFolder(source) as folder:
        config = _config(folder, out)
        info = {
            "config": config.to_dict(),
            "imported": {"family": folder.family.name, "from": str(source.absolute())},
        }
        with new_path(out) as run_dir:
            run_dir.mkdir()
            _copy_files(source, run_dir)
            try:
                checkpoint = write_checkpoint(plan_weights(run_dir, folder.config, folder))
            except CheckpointError as error:
                raise UsageError(f"cannot write {out}: {error}") from None
            checkpoint_dir.write_json(run_dir / "run.json", info)
            (run_dir / "metrics.jsonl").touch()
    n_parameters, n_active = _parameters(config)
    return Imported(
        family=folder.family.name,
        parameters=n_parameters,
        active_parameters=n_active,
        tensors_read=folder.n_read,
        skipped=folder.skipped,
        peak_memory_bytes=memory.bytes,
        checkpoint=str(checkpoint_dir.checkpoints(out) / checkpoint.name),
    )


def _config(folder: HubFolder, out: Path) -> Config:
    """Return the config of the run. Raises UsageError where the tokenizer is not the model's."""
    model, tokenizer = folder.config, load_hub_tokenizer(folder.folder)
    if model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"{folder.folder} has vocab_size={model.vocab_size} in config.json and a tokenizer of "
            f"{tokenizer.vocab_size} ids; give the model its own tokenizer"
        )
    return folder.run_config(out)


def _copy_files(source: Path, run_dir: Path) -> None:
    """Copy the files of the tokenizer and of generation. tokenizer_config.json names the end of a
    text also where only an id in another file did."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, run_dir / name)
    values = read_json(run_dir / "tokenizer_config.json")
    if not values.get("eos_token") and (name := end_of_text(source)):
        text = json.dumps({**values, "eos_token": name}, indent=1, ensure_ascii=False) + "\n"
        (run_dir / "tokenizer_config.json").write_text(text, "utf-8")


def _check_out(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise UsageError(f"{source} is no folder; give a Hugging Face folder on this machine")
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"--to {out} lies in {source}; choose a place outside")
    if not (source / "config.json").is_file():
        raise UsageError(f"{source} holds no config.json; give a Hugging Face folder")


def _parameters(config: Config) -> tuple[int, int]:
    """Return the number of parameters, and of those that a token uses."""
    with torch.device("meta"):
        costs = costs_of(Transformer(config.model), Workload(config.data.seq_len))
    return int(total(costs, parameters)), int(total(costs, active_parameters))
