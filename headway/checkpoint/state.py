"""What a checkpoint holds beside optimiser states: tensors by name, random number generators."""

import base64
from typing import Any

import torch
from torch import Tensor, nn

from headway.parallel.placement import to_local


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return views of the local parts of parameters and persistent buffers; a tensor shared by two
    names (tied head) appears once."""
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        value = to_local(value)
        if value.numel() and value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        tensors[name] = value
    return tensors


def parameter_of(state: str) -> str:
    """Map `layers.0.norm1.weight.exp_avg` to `layers.0.norm1.weight`."""
    return state.rpartition(".")[0]


def rng_state() -> dict[str, Any]:
    """Return the states of this process's random number generators, JSON-ready."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    encoded = [
        base64.b64encode(t.numpy().tobytes()).decode() for t in [torch.get_rng_state(), *cuda]
    ]
    return {"torch": encoded[0], "cuda": encoded[1:]}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA generators only for as many devices as then."""

    def decode(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(decode(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([decode(text) for text in state["cuda"]])
