"""What `headway eval` and `headway sample` share: options and the trained model they name."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from headway.checkpoint.runtime import Trained


@dataclass(frozen=True)
class TrainedOptions:
    """Options of the verbs that read a trained model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one checkpoint folder inside it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: that of training, where this machine has it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matmuls; auto: that of training, where this machine multiplies it natively."""
    json: bool = False
    """End with one JSON object."""


def load(options: TrainedOptions) -> "Trained":
    """Return the model that the options name; damaged checkpoints and what differs from training
    are reported on stderr."""
    from headway.checkpoint.runtime import load_trained

    trained = load_trained(options.run, options.device, options.dtype)
    damaged = [f"{problem}; using the one before" for problem in trained.problems]
    for line in [*damaged, *trained.remarks]:
        print(f"headway: {line}", file=sys.stderr)
    return trained


def facts(trained: "Trained") -> dict[str, str]:
    """Return checkpoint, device and dtype of the matmuls, for `--json`."""
    return {
        "checkpoint": str(trained.checkpoint),
        "device": trained.model.embed.weight.device.type,
        "dtype": str(trained.model.dtype).removeprefix("torch."),
    }
