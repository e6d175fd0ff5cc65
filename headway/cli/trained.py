"""What the verbs that read a trained model share: options and the model they name."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headway.config import UsageError

if TYPE_CHECKING:
    from headway.hub.load import LoadedModel
    from headway.parallel.mesh import Mesh
    from headway.serve.params import SamplingParams


@dataclass(frozen=True)
class TrainedOptions:
    """Options of the verbs that read a trained model."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, one of its checkpoints, or a Hugging Face folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: that of training, where this machine has it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the matmuls; auto: that of training, where this machine multiplies it natively."""
    threads: int = 0
    """CPU threads; 0: as many as in training."""
    json: bool = False
    """End with one JSON object."""


@dataclass(frozen=True)
class SamplingOptions(TrainedOptions):
    """Options of the verbs that write text with one."""

    tokens: int = 200
    """Most tokens of a text; fewer where it ends."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then from the smallest set whose probability reaches p; 1 keeps all."""
    seed: int = 0
    """The same seed gives the same text."""

    def params(self) -> "SamplingParams":
        """Return them as the engine takes them. Raises UsageError for a value out of its range."""
        from headway.serve.params import SamplingParams

        if self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens} is below 1; use 1 or more")
        params = SamplingParams(
            max_tokens=self.tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )
        params.check_values()
        return params


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
