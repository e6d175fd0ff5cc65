"""The cases of bench/gpu_layer.py and one row of numbers for each."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import gpu_measure
from headway.kernels.activation import n_inputs
from headway.kernels.experts import experts
from headway.kernels.gpu.tune import Tiles, tune
from headway.kernels.route import route
from headway.kernels.rows import sort_rows
from headway.model.moe import MultiHeadLatentMoE


@dataclass(frozen=True)
class Shape:
    """One case: T tokens, H heads of width L, E experts per head of hidden width F, K chosen."""

    T: int
    H: int
    L: int
    E: int
    K: int
    F: int
    activation: str = "swiglu"

    def __str__(self) -> str:
        return f"{self.H}x{self.L} E{self.E} k{self.K} F{self.F} T{self.T} {self.activation}"

    def flop(self) -> float:
        """Of the products of forward and backward."""
        rows = self.T * self.H * self.K
        return 3 * 2 * rows * (n_inputs(self.activation) + 1) * self.L * self.F


def narrow_shapes(quick: bool) -> list[Shape]:
    """A middle case for every head width, and one thing changed at a time."""
    found = []
    for L in (64, 128, 256, 512):
        base = Shape(32 * 1024, 1024 // L, L, 256, 4, 256)
        found += [base, replace(base, activation="gelu")]
        if quick or L == 512:
            continue
        found += [replace(base, F=F) for F in (128, 512)]
        found += [replace(base, E=E) for E in (64, 1024)]
        found += [replace(base, K=K) for K in (2, 8)]
        found += [replace(base, T=T * 1024) for T in (16, 128)]
        found.append(replace(base, H=2 * base.H))
    return found


def router_shapes() -> list[Shape]:
    """Routers of every head width, by experts and choices."""
    one_each = [s for s in narrow_shapes(quick=True) if s.activation == "swiglu"]
    return [replace(s, E=E, K=K) for s in one_each for E, K in ((64, 2), (256, 4), (1024, 8))]


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


def expert_calls(s: Shape, index_THK: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Ours and every rival that can do this shape, as functions of (x, gates, w_in, w_out)."""
    from bench.gpu_rivals import rivals

    def bind(function):
        return lambda x, gate, w_in, w_out: function(x, gate, index_THK, w_in, w_out, s.activation)

    found = {"headway": ours, **rivals(s.activation, s.H * s.E, s.F)}
    return {name: bind(function) for name, function in found.items()}


def each(calls: dict[str, Callable[[], Any]], failed: dict[str, str]) -> dict[str, Any]:
    """What every call returns, by name. A rival may not take a shape, may not compile or may need
    more memory than there is: the first line of its error goes to `failed`. Ours must work."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = call()
            _wait()
        except Exception as why:
            if name == "headway":
                raise
            failed[name] = f"{type(why).__name__}: {str(why).strip().partition(chr(10))[0]}"
            found.pop(name, None)
        if torch.cuda.is_available():  # not while `why` holds the failed call's tensors
            torch.cuda.empty_cache()
    return found


def able(runs: dict[str, Callable[[], object]], failed: dict[str, str]) -> dict[str, Callable]:
    """Those that run here."""

    def once(run: Callable[[], object]) -> None:
        run()  # what it returns may be large

    found = each({n: functools.partial(once, run) for n, run in runs.items()}, failed)
    return {name: runs[name] for name in found}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def expert_row(part: str, s: Shape, device: torch.device, repeats: int, peak: float) -> dict:
    """Time, rate, memory and error of one shape; `peak` is the matmul ceiling in TFLOP/s."""
    made, index_THK, d_out = inputs(s, device)
    calls = expert_calls(s, index_THK)
    runs = {n: gpu_measure.forward_backward(c, made, d_out) for n, c in calls.items()}
    failed: dict[str, str] = {}
    runs = able(runs, failed)
    calls = {n: calls[n] for n in runs}
    found = gpu_measure.times(runs, repeats)
    median = {name: statistics.median(ms) for name, ms in found.items()}
    weights = made[2:]
    row = {"part": part, "shape": str(s), **asdict(s), "ms": median, "raw_ms": found}
    row["tflops"] = {name: s.flop() / ms / 1e9 for name, ms in median.items()}
    row["share_of_matmul"] = row["tflops"]["headway"] / peak
    bound = functools.partial
    kept = {n: bound(gpu_measure.kept_bytes, c, made, weights) for n, c in calls.items()}
    row["kept_bytes"] = each(kept, failed)
    row["peak_mib"] = each({n: bound(gpu_measure.peak_mib, r) for n, r in runs.items()}, failed)
    row["error"] = expert_errors(replace(s, T=512), device, failed)
    row["failed"] = failed
    return row


def expert_errors(
    s: Shape, device: torch.device, failed: dict[str, str] | None = None
) -> dict[str, dict[str, float]]:
    """Of output and worst gradient, by name; `failed` takes the messages of those that cannot."""
    from bench.gpu_rivals import loop

    made, index_THK, d_out = inputs(s, device)

    def truth(x, gate, w_in, w_out):
        return loop(x, gate, index_THK, w_in, w_out, s.activation)

    calls = {n: c for n, c in expert_calls(s, index_THK).items() if "compiled" not in n}
    if device.type == "cpu":  # the others have no backward, or no bfloat16, without a GPU
        calls = {n: calls[n] for n in ("headway", "grouped_mm", "dense loop", "ScatterMoE")}
    bound = functools.partial(functools.partial, gpu_measure.errors)
    measures = {n: bound(c, truth, made, d_out) for n, c in calls.items()}
    return each(measures, {} if failed is None else failed)


def tune_experts(s: Shape, device: torch.device) -> dict[str, Tiles]:
    """The fastest tiles of each kernel of the experts for one width, kept on this machine."""
    from headway.kernels.gpu.experts import CANDIDATES, KERNELS

    made, index_THK, d_out = inputs(s, device)
    call = expert_calls(s, index_THK)["headway"]
    found = {}
    for kernel in KERNELS:
        run = gpu_measure.forward_backward(call, made, d_out)
        if kernel == "forward":
            run = functools.partial(call, *made)
        shape = (s.L, n_inputs(s.activation), s.F, made[0].element_size())
        found[kernel] = tune(f"experts_{kernel}", shape, CANDIDATES, run)
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


def tune_router(s: Shape, device: torch.device) -> dict[str, Tiles]:
    """The fastest tiles of each kernel of the router, kept on this machine: whole passes, with
    gradients of the gates and of what the balance loss reads."""
    from headway.kernels.gpu.scores import KERNELS, candidates, fitting

    x, w, d_gate = router_inputs(s, device)
    bias, d_prob = torch.zeros_like(w[..., 0]), torch.ones_like(w[..., 0])

    def run() -> None:
        routed = route(x, w, bias, None, s.K, "topk_softmax", False, 1.0)
        torch.autograd.grad((routed.gate_THK, routed.prob_HE), (x, w), (d_gate, d_prob))

    found = {}
    for kernel in KERNELS:
        if kernel == "route_columns" and fitting("route", x, w).cols >= s.E:
            continue  # not launched
        found[kernel] = tune(kernel, (s.L, s.E, x.element_size()), candidates(s.E), run)
    return found


def router_row(s: Shape, device: torch.device, repeats: int) -> dict:
    """Forward with the gradient of the gates; the rival without tensor cores has no backward, so a
    second set of times is forward alone."""
    from bench.gpu_rival_routers import route_ieee, route_naive

    x, w, d_gate = router_inputs(s, device)

    def both(function):
        return lambda: torch.autograd.grad(function(x, w, s.K)[1], (x, w), d_gate)

    def forward(function):
        return lambda: function(x.detach(), w.detach(), s.K)

    pair = {"headway": both(route_ours), "naive": both(route_naive)}
    found = gpu_measure.times(pair, repeats)
    alone = {n: forward(f) for n, f in (("headway", route_ours), ("IEEE top-k", route_ieee))}
    failed: dict[str, str] = {}
    alone = able(alone, failed)
    found_alone = gpu_measure.times(alone, repeats)
    return {
        "part": "router",
        "shape": str(s),
        **asdict(s),
        "ms": {name: statistics.median(ms) for name, ms in found.items()},
        "raw_ms": found,
        "forward_ms": {name: statistics.median(ms) for name, ms in found_alone.items()},
        "raw_forward_ms": found_alone,
        "same_choice": _agreement(x, w, s.K),
        "failed": failed,
    }


def _agreement(x: Tensor, w: Tensor, k: int) -> float:
    """Share of slots that choose what float64 chooses, of 512 tokens."""
    x, w = x[:512].detach(), w.detach()
    score = torch.einsum("thl,hel->the", x.double(), w.double())
    return float((route_ours(x, w, k)[0] == score.topk(k, dim=-1).indices).double().mean())


def layer_row(s: Shape, device: torch.device, repeats: int) -> dict:
    """A whole Multi-Head LatentMoE of width H·L with ours, and with the naive router and each
    rival's experts."""
    from bench.gpu_rival_routers import route_naive
    from bench.gpu_rivals import rivals

    torch.manual_seed(0)
    D = s.H * s.L
    layer = MultiHeadLatentMoE(
        D,
        s.H,
        s.E,
        s.K,
        s.F,
        activation=s.activation,
        recompute=True,  # type: ignore[arg-type]
    ).to(device)
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
    calls |= {n: with_rival(f) for n, f in rivals(s.activation, s.H * s.E, s.F).items()}
    runs = {n: lambda c=c: torch.autograd.grad(c(), wanted, d_out) for n, c in calls.items()}
    failed: dict[str, str] = {}
    runs = able(runs, failed)
    found = gpu_measure.times(runs, repeats)
    return {
        "part": "layer",
        "shape": str(s),
        **asdict(s),
        "ms": {name: statistics.median(ms) for name, ms in found.items()},
        "raw_ms": found,
        "peak_mib": {name: gpu_measure.peak_mib(call) for name, call in runs.items()},
        "failed": failed,
    }
