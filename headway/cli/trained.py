"""What the verbs that read a trained model share: options and the model they name."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headway.config import UsageError

if TYPE_CHECKING:
    from headway.hub.load import LoadedModel
    from headway.parallel.mesh import Mesh


@dataclass(frozen=True)
class TrainedOptions:
    """Options of the verbs that read a trained model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one checkpoint folder inside it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: that of training, where this machine has it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the matmuls; auto: that of training, where this machine multiplies it natively."""
    threads: int = 0
    """CPU threads; 0: as many as in training."""
    json: bool = False
    """End with one JSON object."""


def load(options: TrainedOptions, mesh: "Mesh | None" = None) -> "LoadedModel":
    """Return the model that the options name, on a mesh this rank's part of it; damaged checkpoints
    and what differs from training are reported on stderr."""
    if options.threads < 0:
        raise UsageError(f"--threads {options.threads} is below 0; 0 means as many as in training")
    from headway.hub.load import load_model
    from headway.parallel.mesh import Mesh

    mesh = mesh or Mesh()
    loaded = load_model(options.run, options.device, options.dtype, options.threads, mesh=mesh)
    for line in loaded.info.lines if mesh.is_main else ():
        print(f"headway: {line}", file=sys.stderr)
    return loaded


def facts(loaded: "LoadedModel") -> dict[str, str]:
    """Return checkpoint, device and dtype of the matmuls, for `--json`."""
    return {
        "checkpoint": str(loaded.info.source),
        "device": loaded.model.device.type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
