"""The sides of bench/serve_layer.py, each in a process of its own: `python serve_layer_rivals.py
SIDE FOLDER TOKENS`. A request is {"tokens": T, "calls": N}: N calls of T tokens each, the next ones
of those in the folder; the answer has the seconds of a call. With no calls it is the layer's output
for the first T tokens.

`xiaotu` runs in an environment with numpy alone: nothing else is imported before it is needed.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.worker import work

Layer = Callable[[int, int], list[list[float]] | None]
"""Compute the output of tokens first … first + n − 1; as numbers where n is negative."""


def headway(folder: Path) -> Layer:
    """Our sparse layer, packed, its router included."""
    import numpy as np
    import torch

    from bench.serve_layer import new_layer
    from headway.model.packing import pack_

    torch.set_num_threads(1)
    layer = new_layer(folder)
    pack_(layer, torch.bfloat16)
    x_PD = torch.from_numpy(np.load(folder / "x.npy")).view(torch.bfloat16)

    @torch.no_grad()
    def compute(first: int, n: int):
        y_TD, _ = layer(x_PD[first : first + abs(n)])
        return y_TD.tolist() if n < 0 else None

    return compute


def grouped_mm(folder: Path) -> Layer:
    """`grouped_mm` of PyTorch as Transformers calls it, which is given the router's answer."""
    import numpy as np
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.set_num_threads(1)
    tensors = {p.stem: torch.from_numpy(np.load(p)) for p in folder.glob("*.npy")}
    w_13, w_2 = tensors["w_13"].view(torch.bfloat16), tensors["w_2"].view(torch.bfloat16)
    E, D, F = w_2.shape
    config = Qwen3MoeConfig(num_experts=E, hidden_size=D, moe_intermediate_size=F)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    experts.load_state_dict({"gate_up_proj": w_13, "down_proj": w_2})
    x_PD, index_PK = tensors["x"].view(torch.bfloat16), tensors["index"].long()
    gate_PK = tensors["gate"].bfloat16()

    @torch.no_grad()
    def compute(first: int, n: int):
        rows = slice(first, first + abs(n))
        y_TD = experts(x_PD[rows], index_PK[rows], gate_PK[rows])
        return y_TD.tolist() if n < 0 else None

    return compute


def xiaotu(folder: Path) -> Layer:
    """xiaotu-moe, which is given the router's answer; its settings come from the environment."""
    import numpy as np
    import xiaotu_moe

    arrays = {p.stem: np.ascontiguousarray(np.load(p)) for p in folder.glob("*.npy")}
    x_PD, index_PK, gate_PK = arrays["x"], arrays["index"], arrays["gate"]
    E, D, F = arrays["w_2"].shape
    config = xiaotu_moe.MOEConfigV2()
    config.expert_num, config.top_k = E, index_PK.shape[1]
    config.hidden_size, config.intermediate_size = D, F
    config.max_batch_size = config.max_num_seqs = 64
    layer = xiaotu_moe.MOE_BF16(config, arrays["w_13"].ctypes.data, arrays["w_2"].ctypes.data)
    y_TD = np.zeros((64, D), np.float32)

    def at(array: np.ndarray, row: int) -> int:
        return array.ctypes.data + row * array.strides[0]

    def compute(first: int, n: int, _alive=arrays):
        rows = (at(index_PK, first), at(gate_PK, first), at(x_PD, first), y_TD.ctypes.data)
        layer.cpu_prefill(abs(n), config.top_k, *rows)
        return y_TD[: abs(n)].tolist() if n < 0 else None

    return compute


def steps(layer: Layer, n_tokens: int) -> Callable[[dict], dict]:
    """Answer requests, from token to token of the folder's `n_tokens`."""
    position = 0

    def step(request: dict) -> dict:
        nonlocal position
        n = request["tokens"]
        if not request["calls"]:
            return {"output": layer(0, -n)}
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in itertools.repeat(None, request["calls"]):
            layer(position, n)
            position = position + n if position + 2 * n <= n_tokens else 0
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        return {"seconds": seconds / request["calls"], "cpu_seconds": cpu / request["calls"]}

    return step


if __name__ == "__main__":
    side, path = sys.argv[1], Path(sys.argv[2])
    sides = {"headway": headway, "grouped_mm": grouped_mm, "xiaotu-moe": xiaotu}
    work(lambda: steps(sides[side](path), int(sys.argv[3])))
