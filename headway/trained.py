"""A trained model from its folder, ready to be evaluated or sampled."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from headway.config import Config, UsageError
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.kernels.experts import check_float8
from headway.model.transformer import Transformer
from headway.train import checkpoint, folder, saved
from headway.train.resolve import expert_width, native_bfloat16, resolve

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]


class Trained(NamedTuple):
    """A model with everything that is needed to use it."""

    config: Config
    """Resolved."""
    model: Transformer
    """On its device, in evaluation mode."""
    tokenizer: Tokenizer
    checkpoint: Path
    problems: list[str]
    """One sentence for each newer checkpoint that is damaged."""
    remarks: list[str]
    """One sentence for everything that this machine does in another way than training did."""


def load_trained(path: str | Path, device: Device = "auto", dtype: Dtype = "auto") -> Trained:
    """The model of a run folder (its newest whole checkpoint), or of one checkpoint folder inside a
    run.

    Args: device, dtype: of the matmuls; auto is what the run was trained with, where this machine
    has it.

    Raises UsageError where there is no whole checkpoint, or no run.json above it.
    """
    path = Path(path)
    problems: list[str] = []
    if (path / "run.json").is_file():
        run_dir = path
        found, problems = folder.find_checkpoint(run_dir)
        if found is None:
            raise UsageError(
                f"{path} holds no checkpoint yet; train it first: headway train --resume {path}"
            )
    elif (path / "manifest.json").is_file() or path.name.startswith("step-"):
        run_dir, found = path.parent.parent, path
        if problem := saved.verify(path):
            raise UsageError(
                f"checkpoint {path} is damaged: {problem}; give the run folder for the one before"
            )
    else:
        raise UsageError(
            f"{path} is neither a run folder nor a checkpoint; give the --run of a `headway train`"
        )
    config, remarks = _fitting(folder.read_config(run_dir), device, dtype)
    tokenizer = load_tokenizer(config.data.tokenizer)
    resolved = resolve(config, tokenizer.vocab_size)
    model = Transformer(resolved.config.model, dtype=resolved.dtype)
    checkpoint.load_model(found, model)
    model.to(resolved.device).eval()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return Trained(resolved.config, model, tokenizer, found, problems, remarks)


def _fitting(config: Config, device: Device, dtype: Dtype) -> tuple[Config, list[str]]:
    """The config of a run with a device, a dtype and a precision that this machine has, and the
    remarks of `Trained`. A machine that is slow is no error here, whatever `run.strict` says."""
    run, model, remarks = config.run, config.model, []
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UsageError("--device cuda and this torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = run.device
        if device == "cuda" and not cuda:
            device = "cpu"
            remarks.append("trained with run.device=cuda, and this torch sees none: on the CPU")
    place = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    if dtype == "auto":
        dtype = run.dtype
        if dtype == "bfloat16" and not native_bfloat16(place):
            dtype = "float32"
            remarks.append(
                f"trained with run.dtype=bfloat16, which this {place.type} emulates: in float32"
            )
    run = dataclasses.replace(run, device=device, dtype=dtype, strict=False)
    if model.moe.kind != "dense" and model.moe.precision == "float8":
        narrow = dtype == "bfloat16" or (dtype == "auto" and native_bfloat16(place))
        used = torch.bfloat16 if narrow else torch.float32
        try:
            check_float8(place.type, used, expert_width(model), model.moe.d_expert)
        except UsageError as error:
            why = str(error).replace("=float8 ", "=float8, which ").removesuffix("; use bfloat16")
            name = str(used).removeprefix("torch.")
            remarks.append(f"trained with {why}; here the experts multiply in {name}")
            model = dataclasses.replace(
                model, moe=dataclasses.replace(model.moe, precision="bfloat16")
            )
    return dataclasses.replace(config, model=model, run=run), remarks
