"""The shapes of bench/gpu_day.py and one row of numbers for each."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import gpu_measure
from headway.config import Activation, n_inputs
from headway.kernels.experts import experts
from headway.kernels.permute import sort_rows
from headway.kernels.route import route
from headway.model.layers import MultiHeadLatentMoE

if TYPE_CHECKING:
    from bench.gpu_stages import Record


@dataclass(frozen=True)
class Shape:
    """One case: T tokens, H heads of width L, E experts per head of hidden width F, K chosen."""

    T: int
    H: int
    L: int
    E: int
    K: int
    F: int
    activation: Activation = "swiglu"

    def __str__(self) -> str:
        return f"{self.H}x{self.L} E{self.E} k{self.K} F{self.F} T{self.T} {self.activation}"

    def flop(self) -> float:
        """Of the products of forward and backward."""
        rows = self.T * self.H * self.K
        return 3 * 2 * rows * (n_inputs(self.activation) + 1) * self.L * self.F


BASE = {L: Shape(32 * 1024, 1024 // L, L, 256, 4, 256) for L in (64, 128, 256, 512)}
"""By width: as many heads as make 1,024, 256 experts each."""

ROUTERS = [replace(s, E=E, K=K) for E, K in ((256, 4), (64, 2), (1024, 8)) for s in BASE.values()]

FLAT = {
    "OLMoE": Shape(16 * 1024, 1, 2048, 64, 8, 1024),
    "Qwen3-30B-A3B": Shape(16 * 1024, 1, 2048, 128, 8, 768),
}


def inputs(s: Shape, device: torch.device, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """(x, gates, w_in, w_out) with gradients, index_THK, the output's gradient; experts uneven, as
    a young router leaves them."""
    g = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    x_THL = draw(s.T, s.H, s.L).bfloat16()
    score_THE = draw(s.T, s.H, s.E) + 0.5 * draw(s.H, s.E)
    top = score_THE.topk(s.K, dim=-1)
    made = [
        x_THL,
        torch.softmax(top.values, -1),
        # masters that hold bfloat16 values: the cast is not part of the error
        (draw(s.H, s.E, n_inputs(s.activation), s.F, s.L) / s.L**0.5).bfloat16().float(),
        (draw(s.H, s.E, s.F, s.L) / s.F**0.5).bfloat16().float(),
    ]
    return [t.requires_grad_() for t in made], top.indices, draw(s.T, s.H, s.L).bfloat16()


def ours(x_THL, gate_THK, index_THK, w_in_HEGFL, w_out_HEFL, activation: str) -> Tensor:
    """Sort and fused experts, in the constant-memory form."""
    y_NL = experts(
        x_THL.flatten(0, 1),
        gate_THK.flatten(0, 1),
        sort_rows(index_THK, w_in_HEGFL.shape[1]),
        w_in_HEGFL,
        w_out_HEFL,
        activation,  # type: ignore[arg-type]
        recompute=True,
    )
    return y_NL.view(x_THL.shape)


def expert_calls(
    s: Shape, index_THK: Tensor, compiled: bool = False
) -> dict[str, Callable[..., Tensor]]:
    """Ours and every rival that can do this shape, as functions of (x, gates, w_in, w_out); with
    `compiled` those too that torch.compile makes, for half a minute each."""
    from bench.gpu_rivals import rivals

    def bind(function):
        return lambda x, gate, w_in, w_out: function(x, gate, index_THK, w_in, w_out, s.activation)

    found = {"headway": ours, **rivals(s.activation, s.H * s.E, s.F)}
    if not compiled:
        found = {n: f for n, f in found.items() if n not in COMPILED}
    return {name: bind(function) for name, function in found.items()}


COMPILED = ("grouped_mm, compiled", "FlexAttention")


def alive(calls: Mapping[str, Callable[[], object]], row: dict) -> dict[str, Callable[[], object]]:
    """Those that run; why the others do not goes into the row. Ours must run."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except Exception as error:
            if name == "headway":
                raise
            row.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def expert_row(part: str, s: Shape, record: "Record", compiled: bool = False) -> dict:
    """Time, rate, memory of one shape."""
    made, index_THK, d_out = inputs(s, record.device)
    row: dict = {"part": part, "shape": str(s), **asdict(s)}
    calls = expert_calls(s, index_THK, compiled)
    runs = {n: gpu_measure.forward_backward(c, made, d_out) for n, c in calls.items()}
    runs = alive(runs, row)
    found = gpu_measure.times(runs, record.repeats)
    median = {name: statistics.median(ms) for name, ms in found.items()}
    row |= {"ms": median, "raw_ms": found}
    row["tflops"] = {name: s.flop() / ms / 1e9 for name, ms in median.items()}
    weights = made[2:]
    row["kept_bytes"] = {"headway": gpu_measure.kept_bytes(calls["headway"], made, weights)}
    row["peak_mib"] = {name: gpu_measure.peak_mib(call) for name, call in runs.items()}
    return row


def expert_errors(s: Shape, device: torch.device) -> dict[str, dict]:
    """Of output and worst gradient, by name; or why a rival has none."""
    from bench.gpu_rivals import loop

    made, index_THK, d_out = inputs(s, device)

    def truth(x, gate, w_in, w_out):
        return loop(x, gate, index_THK, w_in, w_out, s.activation)

    calls = expert_calls(s, index_THK, compiled=True)
    calls.pop("grouped_mm, compiled", None)
    if device.type == "cpu":  # the others have no backward, or no bfloat16, without a GPU
        calls = {n: calls[n] for n in ("headway", "grouped_mm", "dense loop")}
    found: dict[str, dict] = {}
    for name, call in calls.items():
        try:
            found[name] = gpu_measure.errors(call, truth, made, d_out)
        except Exception as error:
            if name == "headway":
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return found


def route_ours(x_THL: Tensor, w_HEL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The fused router: index and gates."""
    bias_HE = torch.zeros(w_HEL.shape[:2], device=w_HEL.device)
    routed = route(x_THL, w_HEL, bias_HE, None, k, "topk_softmax", False, 1.0)
    return routed.index_THK, routed.gate_THK


def router_inputs(s: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x_THL and w_HEL with gradients, the gates' gradient."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(s.T, s.H, s.L, generator=g, device=device).bfloat16().requires_grad_()
    w = torch.randn(s.H, s.E, s.L, generator=g, device=device).div(s.L**0.5).requires_grad_()
    return x, w, torch.randn(s.T, s.H, s.K, generator=g, device=device)


def router_pass(s: Shape, device: torch.device) -> Callable[[], object]:
    """Forward and backward of our router with gradients of the gates and of what the balance loss
    reads."""
    x, w, d_gate = router_inputs(s, device)
    bias, d_prob = torch.zeros_like(w[..., 0]), torch.ones_like(w[..., 0])

    def run() -> object:
        routed = route(x, w, bias, None, s.K, "topk_softmax", False, 1.0)
        return torch.autograd.grad((routed.gate_THK, routed.prob_HE), (x, w), (d_gate, d_prob))

    return run


def router_row(s: Shape, record: "Record") -> dict:
    """Forward with the gradient of the gates (`ms`), with that of the balance loss too
    (`balance_ms`), and forward alone, since the rival without tensor cores has no backward."""
    from bench.gpu_rival_routers import route_ieee, route_naive

    x, w, d_gate = router_inputs(s, record.device)
    row: dict = {"part": "router", "shape": str(s), **asdict(s)}

    def both(function):
        return lambda: torch.autograd.grad(function(x, w, s.K)[1], (x, w), d_gate)

    def forward(function):
        return lambda: function(x.detach(), w.detach(), s.K)

    def naive_balanced() -> object:
        score_HTE = torch.bmm(x.float().transpose(0, 1), w.transpose(1, 2))
        top = score_HTE.topk(s.K, dim=-1)
        gate = torch.softmax(top.values, -1).transpose(0, 1)
        prob_HE = torch.softmax(score_HTE, -1).mean(1)
        return torch.autograd.grad((gate, prob_HE), (x, w), (d_gate, torch.ones_like(prob_HE)))

    sets = {
        "ms": {"headway": both(route_ours), "naive": both(route_naive)},
        "balance_ms": {"headway": router_pass(s, record.device), "naive": naive_balanced},
        "forward_ms": {"headway": forward(route_ours), "IEEE top-k": forward(route_ieee)},
    }
    for name, calls in sets.items():
        found = gpu_measure.times(alive(calls, row), record.repeats)
        row[name] = {n: statistics.median(ms) for n, ms in found.items()}
        row[f"raw_{name}"] = found
    row["same_choice"] = _agreement(x, w, s.K)
    return row


def _agreement(x: Tensor, w: Tensor, k: int) -> float:
    """Share of slots that choose what float64 chooses, of 512 tokens."""
    x, w = x[:512].detach(), w.detach()
    score = torch.einsum("thl,hel->the", x.double(), w.double())
    return float((route_ours(x, w, k)[0] == score.topk(k, dim=-1).indices).double().mean())


def layer_row(s: Shape, record: "Record") -> dict:
    """A whole Multi-Head LatentMoE of width H·L with ours, and with the naive router and each
    rival's experts."""
    from bench.gpu_rival_routers import route_naive
    from bench.gpu_rivals import rivals

    torch.manual_seed(0)
    D, device = s.H * s.L, record.device
    layer = MultiHeadLatentMoE(D, s.H, s.E, s.K, s.F, activation=s.activation, recompute=True).to(
        device
    )
    x = torch.randn(s.T, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    d_out, wanted = torch.randn_like(x), [x, *layer.parameters()]

    def with_rival(rival):
        def call() -> Tensor:
            z_THL = layer.split(x)
            index_THK, gate_THK = route_naive(z_THL, layer.router.w_HEL, s.K)
            e = layer.experts
            y_THL = rival(z_THL, gate_THK, index_THK, e.w_in_HEGFL, e.w_out_HEFL, s.activation)
            return layer.merge(y_THL)

        return call

    calls = {"headway": lambda: layer(x)[0]}
    found = rivals(s.activation, s.H * s.E, s.F)
    calls |= {n: with_rival(f) for n, f in found.items() if n not in COMPILED}
    row: dict = {"part": "layer", "shape": str(s), **asdict(s)}
    runs = {n: lambda c=c: torch.autograd.grad(c(), wanted, d_out) for n, c in calls.items()}
    runs = alive(runs, row)
    found = gpu_measure.times(runs, record.repeats)
    row["ms"] = {name: statistics.median(ms) for name, ms in found.items()}
    row["raw_ms"] = found
    row["peak_mib"] = {name: gpu_measure.peak_mib(call) for name, call in runs.items()}
    return row


def line(row: dict) -> str:
    """One row for people: milliseconds by name, the fastest first, and what else is known."""
    cells = [f"{row['part']:<8}{row['shape']:<34}"]
    cells += [f"{n} {ms:.2f}" for n, ms in sorted(row["ms"].items(), key=lambda item: item[1])]
    if "tflops" in row:
        cells += [f"{row['tflops']['headway']:.0f} TFLOP/s"]
        cells += [f"keeps {row['kept_bytes']['headway'] / 2**20:.0f} MiB"]
    for name in ("balance_ms", "forward_ms"):
        if name in row:
            cells += [f"{name}: " + ", ".join(f"{n} {ms:.2f}" for n, ms in row[name].items())]
    if "same_choice" in row:
        cells += [f"chooses as float64 {row['same_choice']:.3%}"]
    if row.get("peak_mib", {}).get("headway") is not None:
        cells += ["peak MiB " + ", ".join(f"{n} {m:.0f}" for n, m in row["peak_mib"].items())]
    cells += [f"{n} FAILED {why[:80]}" for n, why in row.get("failed", {}).items()]
    return "  ".join(cells)
