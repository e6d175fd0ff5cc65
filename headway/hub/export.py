"""Write a trained model as a Hugging Face folder: weights, tokenizer, model card, and for a model
that no known family can express the code that computes it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from headway.checkpoint import run_folder
from headway.checkpoint.checkpoint_dir import write_json
from headway.checkpoint.tensor_files import MAX_FILE_BYTES
from headway.checkpoint.tensor_reader import TensorReader
from headway.config import Config, UsageError
from headway.data.tokenizer import Tokenizer
from headway.hub.export_family import export_family
from headway.hub.export_tokenizer import special_ids, write_tokenizer
from headway.hub.families import HEADWAY, choose_family, find_family
from headway.hub.family import Family
from headway.hub.folder import read_json
from headway.hub.load import find_trained, tokenizer_of
from headway.hub.model_card import model_card
from headway.hub.new_path import new_path

ExportDtype: TypeAlias = Literal["bfloat16", "float32", "float16"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_REMOTE = Path(__file__).parent / "remote"
_REMOTE_CLASSES = {
    "AutoConfig": "configuration_headway.HeadwayConfig",
    "AutoModel": "modeling_headway.HeadwayModel",
    "AutoModelForCausalLM": "modeling_headway.HeadwayForCausalLM",
}


class Exported(NamedTuple):
    """What was written."""

    model_type: str
    files: list[str]
    bytes: int
    left_out: list[str]
    """Tensors of the checkpoint that only training reads."""


class Source:
    """Context with an open run: what is exported.

    Raises: UsageError where `path` is no run and no checkpoint of one."""

    def __init__(self, path: Path) -> None:
        self.run_dir, self.checkpoint, self.problems = find_trained(path)
        config = run_folder.read_config(self.run_dir)
        self.tokenizer: Tokenizer = tokenizer_of(self.run_dir, config)
        size, max_len = self.tokenizer.vocab_size, config.model.max_len or config.data.seq_len
        model = replace(config.model, vocab_size=size, max_len=max_len)
        self.config: Config = replace(config, model=model)
        """With the vocabulary of the tokenizer: rows that only pad it are left out."""
        info = json.loads((self.run_dir / "run.json").read_text("utf-8"))
        self._imported: str = info.get("imported", {}).get("family", "")
        self.weights = TensorReader(self.checkpoint, "model")

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.__exit__()

    def choose(self, name: str) -> Family:
        """Return the family called `name`; for `auto` the one that the model was imported from, or
        a known one that computes the same, or `headway`. Raises UsageError for one that does not,
        naming the option."""
        config = self.config.model
        if name == "auto":
            known, _ = choose_family(config, self._imported)
            family = HEADWAY if known is None or self._biased_beside(known) else known
        else:
            family = find_family(name)
        if differences := family.differences(config):
            hint = "" if family is HEADWAY else "; use --as auto"
            raise UsageError(f"no {family.name} model has {differences[0]}{hint}")
        return family

    def _biased_beside(self, family: Family) -> bool:
        """Return whether a family without a bias on the selection would lose one."""
        biases = [name for name in self.weights.names() if name.endswith("router.bias_HE")]
        return not family.router_bias and any(self.weights.read(name).any() for name in biases)


def export_hf(
    source: Source,
    to: Path,
    dtype: ExportDtype,
    family: str = "auto",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the folder `to`, complete or not at all, its weights in files of about `max_file_bytes`
    at most.

    Args: family: a `model_type`, or `auto`: see `Source.choose`.
    Raises: UsageError where `to` exists or cannot be written, and for a model that the family
    cannot express."""
    chosen, model = source.choose(family), source.config.model
    with new_path(to) as folder:
        folder.mkdir()
        how = (chosen, DTYPES[dtype], folder, max_file_bytes)
        left_out = export_family(model, source.weights, *how)
        _complete_config(folder / "config.json", chosen, special_ids(source.tokenizer))
        write_tokenizer(folder, source.tokenizer, model.max_len, source.run_dir)
        if chosen is HEADWAY:
            for path in _REMOTE.glob("*.py"):
                shutil.copyfile(path, folder / path.name)
        card = model_card(source.run_dir, source.config, chosen.name, dtype)
        (folder / "README.md").write_text(card, "utf-8")
    files = sorted(to.iterdir())
    total = sum(path.stat().st_size for path in files)
    left_out = [name for name in left_out if not name.endswith("router.bias_HE")]  # they are 0
    return Exported(chosen.name, [path.name for path in files], total, left_out)


def _complete_config(path: Path, family: Family, ids: dict[str, Any]) -> None:
    """Add to config.json the special ids and, with our own code, where it is."""
    code = {"auto_map": _REMOTE_CLASSES} if family is HEADWAY else {}
    write_json(path, {**read_json(path), **code, "use_cache": True, **ids})
