"""Load a trained model for inference: a device and dtype that this machine has, the weights of a
checkpoint. No training option is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch

from headway.checkpoint import checkpoint_dir, run_folder
from headway.checkpoint.load import load_model
from headway.config import Config, Precision, UsageError
from headway.data.tokenizer import Tokenizer, load_tokenizer
from headway.kernels.paths import check_float8
from headway.kernels.precision import native_bfloat16
from headway.model.build import BlockBuilder, build_block
from headway.model.compute import Compute
from headway.model.transformer import Transformer

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Runtime:
    """Where and how a trained model computes."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of the matmuls."""
    precision: Precision
    """Precision of the experts' matmuls."""
    remarks: tuple[str, ...]
    """One sentence for each difference from training that this machine makes necessary."""


class Trained(NamedTuple):
    """A model with everything that is needed to use it."""

    config: Config
    """The config of the run."""
    model: Transformer
    """On its device, in evaluation mode."""
    tokenizer: Tokenizer
    checkpoint: Path
    problems: list[str]
    """One sentence for each newer checkpoint that is damaged."""
    remarks: tuple[str, ...]
    """Those of the `Runtime`."""


def load_trained(
    path: str | Path,
    device: Device = "auto",
    dtype: Dtype = "auto",
    blocks: BlockBuilder = build_block,
) -> Trained:
    """Return the model of a run folder (its latest undamaged checkpoint), or of one checkpoint
    folder inside a run.

    The model is built on the meta device, each tensor read once. `device` and `dtype` are as for
    `resolve_runtime`, `blocks` as for `Transformer`. Raises UsageError where there is no undamaged
    checkpoint, no run.json above it, no such device, or where `blocks` make another model."""
    run_dir, checkpoint, problems = _find(Path(path))
    config = run_folder.read_config(run_dir)
    runtime = resolve_runtime(config, device, dtype)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UsageError(
            f"{run_dir} has model.vocab_size={config.model.vocab_size} and the tokenizer "
            f"{config.data.tokenizer} has {tokenizer.vocab_size} ids; restore the run's tokenizer"
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    moe = replace(config.model.moe, precision=runtime.precision)
    with torch.device("meta"):
        model = Transformer(replace(config.model, moe=moe), Compute(runtime.dtype), blocks=blocks)
    model.to_empty(device=runtime.device)
    load_model(checkpoint, model)
    return Trained(config, model.eval(), tokenizer, checkpoint, problems, runtime.remarks)


def resolve_runtime(config: Config, device: Device = "auto", dtype: Dtype = "auto") -> Runtime:
    """Choose device, dtype and expert precision for the model of a run.

    `auto` takes what the run was trained with, where this machine has it, and otherwise what it
    has, with a remark. A machine that is slow is no error here, whatever `run.strict` says. Raises
    UsageError for `device="cuda"` without a CUDA device."""
    run, moe, remarks = config.run, config.model.moe, []
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UsageError("--device cuda and this torch sees no CUDA device; use --device cpu")
    if device == "auto":
        device = run.device
        if device == "cuda" and not cuda:
            device = "cpu"
            remarks.append("trained with run.device=cuda, and this torch sees none: on the CPU")
    chosen = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    native = native_bfloat16(chosen)
    if dtype == "auto":
        dtype = run.dtype
        if dtype == "bfloat16" and not native:
            dtype = "float32"
            emulated = f"run.dtype=bfloat16, which this {chosen.type} emulates"
            remarks.append(f"trained with {emulated}: in float32")
    narrow = native if dtype == "auto" else dtype == "bfloat16"
    matmuls = torch.bfloat16 if narrow else torch.float32
    precision: Precision = "bfloat16"
    if moe.kind != "dense" and moe.precision == "float8":
        try:
            width = moe.head_width(config.model.d_model)
            check_float8(chosen.type, matmuls, width, moe.d_expert)
            precision = "float8"
        except UsageError as error:
            why = str(error).replace("=float8 ", "=float8, which ").removesuffix("; use bfloat16")
            name = str(matmuls).removeprefix("torch.")
            remarks.append(f"trained with {why}; here the experts multiply in {name}")
    return Runtime(chosen, matmuls, precision, tuple(remarks))


def _find(path: Path) -> tuple[Path, Path, list[str]]:
    """Return the run folder, the checkpoint to read and one sentence per damaged newer one."""
    if (path / "run.json").is_file():
        checkpoint, problems = run_folder.find_checkpoint(path)
        if checkpoint is None:
            fix = f"train it first: headway train --resume {path}"
            raise UsageError(f"{path} holds no checkpoint yet; {fix}")
        return path, checkpoint, problems
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        if problem := checkpoint_dir.verify(path):
            fix = "give the run folder for the one before"
            raise UsageError(f"checkpoint {path} is damaged: {problem}; {fix}")
        return path.parent.parent, path, []
    raise UsageError(
        f"{path} is neither a run folder nor a checkpoint; give the --run of a `headway train`"
    )
