"""The sparse layer alone at 1 and 16 tokens, bfloat16, one thread: ours, xiaotu-moe and grouped_mm.

    python bench/serve_layer.py [--quick] [--small] [--repetitions N] [--xiaotu PYTHON] [--json]
                                [--save]

64 experts, top-8, D 1024, F 512: 201 MB of random weights, the same for all. Each side is a process
of its own, and they take turns; every call has other tokens, so that its experts come from memory.
Ours computes its router too, the others are given the answer. `grouped_mm` is PyTorch's, as
Transformers calls it. xiaotu-moe is 0.12 (--xiaotu is the python of an environment with it, Python
3.12), with the best of `SETTINGS`; where it is not given it is absent, nothing stands in for it.

Outputs are compared with the layer in float64. The floor is the bytes of the experts that the
tokens touch over the bandwidth with which one thread reads memory.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.worker import Worker
from headway.config import MoEConfig, RouterConfig
from headway.kernels.experts import experts_reference
from headway.model.moe import Experts, SparseLayer
from headway.plan.decode import read_bandwidth

HERE = Path(__file__).resolve().parent
LAYER = MoEConfig(
    kind="moe",
    n_experts=64,
    top_k=8,
    d_expert=512,
    router=RouterConfig(gate="softmax_topk", renormalize=True),
)
D = 1024
SMALL, SMALL_D = replace(LAYER, n_experts=8, top_k=2, d_expert=32), 64
N_TOKENS = 1024
CALLS = {1: 200, 16: 30}
SETTINGS = ({}, {"XIAOTU_MOE_GROUP_FACTOR": "1"}, {"XIAOTU_MOE_NOSHARD": "1"})
"""Environments of xiaotu-moe that were fastest at some number of tokens."""
ERROR = 1e-2
"""Largest relative error of an output in bfloat16 with a hidden layer in bfloat16."""


def write_layer(folder: Path, moe: MoEConfig, D: int) -> None:
    """Write weights, tokens and the router's answer, bfloat16 as uint16, as rivals read them."""
    torch.manual_seed(0)
    E, F = moe.n_experts, moe.d_expert
    sizes = {"n_experts": E, "top_k": moe.top_k, "d_expert": F}
    (folder / "layer.json").write_text(json.dumps(sizes))
    tensors = {
        "w_13": torch.randn(E, 2 * F, D).mul_(D**-0.5).bfloat16(),
        "w_2": torch.randn(E, D, F).mul_(F**-0.5).bfloat16(),
        "router": torch.randn(E, D) * D**-0.5,
        "x": torch.randn(N_TOKENS, D).bfloat16(),
    }
    for name, tensor in tensors.items():
        narrow = tensor.dtype == torch.bfloat16
        np.save(folder / name, tensor.view(torch.uint16).numpy() if narrow else tensor.numpy())
    layer = new_layer(folder)
    with torch.no_grad():
        route = layer.router(tensors["x"])
    np.save(folder / "index", route.index_THK.squeeze(1).int().numpy())
    np.save(folder / "gate", route.gate_THK.squeeze(1).numpy())


def new_layer(folder: Path) -> SparseLayer:
    """Our layer with the weights of a folder, not packed."""
    tensors = {p.stem: torch.from_numpy(np.load(p)) for p in folder.glob("*.npy")}
    w_13, w_2 = tensors["w_13"].view(torch.bfloat16), tensors["w_2"].view(torch.bfloat16)
    moe = replace(LAYER, **json.loads((folder / "layer.json").read_text()))
    E, D, F = w_2.shape
    with torch.device("meta"):
        layer = SparseLayer(D, moe).eval()
    weights = {
        "experts.w_in_HEGFL": w_13.view(1, E, 2, F, D),
        "experts.w_out_HEFL": w_2.transpose(1, 2).unsqueeze(0),
        "router.w_HEL": tensors["router"].unsqueeze(0),
        "router.bias_HE": torch.zeros(1, E),
    }
    layer.load_state_dict(weights, assign=True)
    return layer


def reference(folder: Path, n: int) -> torch.Tensor:
    """The output of the first n tokens in float64."""
    experts = new_layer(folder).experts
    assert isinstance(experts, Experts)
    arrays = {x: torch.from_numpy(np.load(folder / f"{x}.npy")[:n]) for x in ("index", "gate", "x")}
    weights = experts.w_in_HEGFL.detach().double(), experts.w_out_HEFL.detach().double()
    return experts_reference(
        arrays["x"].view(torch.bfloat16).double(),
        arrays["gate"].double(),
        arrays["index"].long().unsqueeze(1),
        *weights,
        LAYER.activation,
    )


def bytes_of(folder: Path, tokens: int) -> float:
    """What a call of `tokens` tokens reads on average: experts that it touches, and the router."""
    layer = new_layer(folder)
    index_PK = np.load(folder / "index.npy")
    calls = index_PK.reshape(-1, tokens * index_PK.shape[1])
    touched = statistics.mean(len(np.unique(call)) for call in calls)
    assert isinstance(layer.experts, Experts)
    w_in, w_out = layer.experts.w_in_HEGFL[0, 0], layer.experts.w_out_HEFL[0, 0]
    return touched * (w_in.nbytes + w_out.nbytes) + layer.router.w_HEL.nbytes


def start(args: argparse.Namespace, folder: Path) -> dict[str, Worker]:
    """The sides, ours first."""
    command = [str(HERE / "serve_layer_rivals.py")]
    rest = [str(folder), str(N_TOKENS)]
    sides = {
        side: Worker([sys.executable, *command, side, *rest]) for side in ("headway", "grouped_mm")
    }
    for setting in SETTINGS if args.xiaotu else ():
        variables = {"OMP_NUM_THREADS": "1", "XIAOTU_MOE_THREADS": "1", **setting}
        words = [f"{key}={value}" for key, value in variables.items()]
        name = " ".join(["xiaotu-moe", *(f"{key}={value}" for key, value in setting.items())])
        python = ["env", *words, args.xiaotu]
        sides[name] = Worker([*python, *command, "xiaotu-moe", *rest])
    return sides


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each side and number of tokens."""
    sides, rows = start(args, folder), []
    try:
        errors, wanted = {}, reference(folder, 16)
        for side, worker in sides.items():
            output = torch.tensor(worker.step({"tokens": 16, "calls": 0})["output"]).double()
            errors[side] = float((output - wanted).norm() / wanted.norm())
            assert errors[side] < ERROR, f"{side} differs by {errors[side]:.3g}"
        bandwidth = read_bandwidth()
        for tokens, calls in CALLS.items():
            request = {"tokens": tokens, "calls": calls}
            steps = {side: lambda w=worker, r=request: w.step(r) for side, worker in sides.items()}
            answers = common.interleaved(steps, args.repetitions)
            bandwidth = max(bandwidth, read_bandwidth())
            for side, calls_of_side in answers.items():
                seconds = [answer["seconds"] for answer in calls_of_side]
                row = {
                    "task": f"{tokens} token{'s' if tokens > 1 else ''}",
                    "side": side,
                    "seconds": seconds,
                    "cpu_seconds": [answer["cpu_seconds"] for answer in calls_of_side],
                    "median": statistics.median(seconds),
                    "bytes": bytes_of(folder, tokens),
                    "error": errors[side],
                }
                rows.append(row)
    finally:
        for worker in sides.values():
            worker.close()
    for row in rows:
        row["bandwidth"], row["floor"] = bandwidth, row["bytes"] / bandwidth
        print(
            f"{row['task']:<10} {row['side']:<34} {row['median'] * 1e3:8.3f} ms, floor "
            f"{row['floor'] * 1e3:.3f} ms, error {row['error']:.1e}"
        )
    return rows


def targets(rows: list[dict]) -> list[dict]:
    """Ratios of medians: a rival's time over ours."""
    times = {(row["task"], row["side"]): row["median"] for row in rows}
    best: dict[tuple[str, str], float] = {}
    for (task, side), seconds in times.items():
        key = (task, side.split()[0])
        best[key] = min(best.get(key, math.inf), seconds)
    out = []
    if one := best.get(("1 token", "xiaotu-moe")):
        ours = best["1 token", "headway"]
        out.append(common.target("1 token: xiaotu-moe / ours", one / ours, 0.9, at_least=True))
    rivals = {s: v for (task, s), v in best.items() if task == "16 tokens" and s != "headway"}
    fastest = min(rivals, key=rivals.__getitem__)
    value = rivals[fastest] / best["16 tokens", "headway"]
    name = "16 tokens: best of xiaotu-moe and grouped_mm / ours"
    return [*out, common.target(name, value, 1.5, at_least=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser, data=False)
    parser.add_argument("--quick", action="store_true", help="two repetitions")
    parser.add_argument("--small", action="store_true", help="a tiny layer: does it run?")
    parser.add_argument("--repetitions", type=int, default=0)
    parser.add_argument("--xiaotu", default="", help="python of an environment with xiaotu-moe")
    args = parser.parse_args()
    args.repetitions = args.repetitions or (2 if args.quick else 9)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_layer(Path(folder), *((SMALL, SMALL_D) if args.small else (LAYER, D)))
        rows = measure(args, Path(folder))
    common.report("serve_layer", rows, targets(rows), args)


if __name__ == "__main__":
    common.run(main)
