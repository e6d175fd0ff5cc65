"""Write a trained model as a Hugging Face folder: weights, tokenizer, model card, and for a model
that no known family can express the code that computes it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from headway.checkpoint.checkpoint_dir import write_json
from headway.checkpoint.tensor_files import MAX_FILE_BYTES
from headway.config import ModelConfig, UsageError
from headway.hub.export_family import export_family
from headway.hub.export_tokenizer import special_ids, write_tokenizer
from headway.hub.families import HEADWAY, choose_family, find_family
from headway.hub.family import Family
from headway.hub.folder import read_json
from headway.hub.model_card import model_card
from headway.hub.new_path import new_path
from headway.hub.trained import Trained

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
    why: str = ""
    """Why the model is of no known family; "" where it is, or another was asked for."""


def exported_config(trained: Trained) -> ModelConfig:
    """Return the config of a model with the vocabulary of its tokenizer: rows that only pad it are
    left out."""
    size = trained.tokenizer.vocab_size
    return replace(trained.config.model, vocab_size=size, max_len=trained.max_len)


def exported_family(trained: Trained, name: str) -> tuple[Family, str]:
    """Return the family called `name`; for `auto` the one that the model came from, or a known one
    that computes the same, or `headway` and why no known one does. Raises UsageError for one that
    does not, naming the option."""
    config, why = exported_config(trained), ""
    if name == "auto":
        known, why = choose_family(config, trained.family)
        if known is not None and _biased_beside(trained, known):
            known, why = None, f"a bias on the selection is not 0, and {known.name} has none"
        family = known or HEADWAY
    else:
        family = find_family(name)
    if differences := family.differences(config):
        if why:
            raise UsageError(f"no family computes this model: {why}; {differences[0]}")
        hint = "" if family is HEADWAY else "; use --as auto"
        raise UsageError(f"no {family.name} model has {differences[0]}{hint}")
    return family, why


def _biased_beside(trained: Trained, family: Family) -> bool:
    """Return whether a family without a bias on the selection would lose one."""
    biases = [name for name in trained.weights.names() if name.endswith("router.bias_HE")]
    return not family.router_bias and any(trained.weights.read(name).any() for name in biases)


def export_hf(
    trained: Trained,
    to: Path,
    dtype: ExportDtype,
    family: str = "auto",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the folder `to`, complete or not at all, its weights in files of about `max_file_bytes`
    at most.

    Args: family: a `model_type`, or `auto`: see `exported_family`.
    Raises: UsageError where `to` exists or cannot be written, and for a model that the family
    cannot express."""
    (chosen, why), model = exported_family(trained, family), exported_config(trained)
    with new_path(to) as folder:
        folder.mkdir()
        how = (chosen, DTYPES[dtype], folder, max_file_bytes)
        left_out = export_family(model, trained.weights, *how)
        _complete_config(folder / "config.json", chosen, special_ids(trained.tokenizer))
        write_tokenizer(folder, trained.tokenizer, model.max_len, trained.folder)
        if chosen is HEADWAY:
            for path in _REMOTE.glob("*.py"):
                shutil.copyfile(path, folder / path.name)
        card = model_card(trained, chosen.name, dtype)
        (folder / "README.md").write_text(card, "utf-8")
    files = sorted(to.iterdir())
    total = sum(path.stat().st_size for path in files)
    left_out = [name for name in left_out if not name.endswith("router.bias_HE")]  # they are 0
    return Exported(chosen.name, [path.name for path in files], total, left_out, why)


def _complete_config(path: Path, family: Family, ids: dict[str, Any]) -> None:
    """Add to config.json the special ids and, with our own code, where it is."""
    code = {"auto_map": _REMOTE_CLASSES} if family is HEADWAY else {}
    write_json(path, {**read_json(path), **code, "use_cache": True, **ids})
