"""AdamW (arXiv 1711.05101) on torch's fused kernel, with moments in float32 or in bfloat16."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from headway.kernels.cpp import cpp_kernels
from headway.parallel.placement import to_local

CHUNK, CHUNK_ON_GPU = 1 << 18, 1 << 24
"""Elements of bfloat16 moments that are widened at once: in a CPU's cache, and in few launches."""


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True), plus bfloat16 moments and a clip factor inside the step.

    bfloat16 moments (DeepSeek-V3, arXiv 2412.19437 §3.3.3) are widened, updated in float32 and
    rounded back: in one pass where the C++ kernels run, else in slices of `chunk` elements through
    the fused kernel, so that no temporary is larger. `updates` counts the steps taken; every
    parameter shares it.

    Args:
        params: parameters or groups of them, float32 (or float64); contiguous when moments are
            bfloat16.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW; the decay is decoupled.
        state_dtype: of both moments; None keeps the parameter's. With bfloat16, beta2 ≤ 0.99: a
            slower average would be lost in rounding (its step of 1 − beta2 must stay above 2⁻⁸).
        chunk: elements per slice of the bfloat16 update; None: `CHUNK`, on GPUs `CHUNK_ON_GPU`."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state_dtype: torch.dtype | None = None,
        chunk: int | None = None,
    ) -> None:
        if state_dtype == torch.bfloat16 and betas[1] > 0.99:
            raise ValueError(f"bfloat16 moments need beta2 <= 0.99 and got {betas[1]}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps})
        self.betas, self.state_dtype, self.chunk = betas, state_dtype, chunk
        self.updates = 0

    @torch.no_grad()
    def step(self, grad_scale: float = 1.0) -> None:  # type: ignore[override]
        """Update with the gradients times `grad_scale` (the clip factor). The fused kernel scales
        the gradients in place when `grad_scale` is not 1; zero them afterwards."""
        self.updates += 1
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.init_state(p)
                    key = (p.device, p.dtype, self.state[p]["exp_avg"].dtype)
                    alike.setdefault(key, []).append(p)
            for params in alike.values():
                grads = [to_local(p.grad) for p in params if p.grad is not None]
                local = [to_local(p) for p in params]
                first = [self.state[p]["exp_avg"] for p in params]
                second = [self.state[p]["exp_avg_sq"] for p in params]
                if first[0].dtype == params[0].dtype:
                    self._fused(group, grad_scale, local, grads, first, second)
                else:
                    for tensors in zip(local, grads, first, second, strict=True):
                        self._sliced(group, grad_scale, *tensors)

    def init_state(self, p: Tensor) -> None:
        """Add zero moments for a parameter that has none yet."""
        if not self.state[p]:
            dtype = self.state_dtype or p.dtype
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[p][name] = torch.zeros_like(to_local(p), dtype=dtype)

    def _fused(self, group: dict[str, Any], grad_scale: float, *tensors: list[Tensor]) -> None:
        """Update; `tensors` are parameters, gradients, first moments and second moments."""
        params = tensors[0]
        updates = torch.full((), self.updates, dtype=torch.float32, device=params[0].device)
        # The kernel divides by its scale, a float32 scalar.
        inverse = None if grad_scale == 1.0 else torch.full_like(updates, 1 / grad_scale)
        torch.ops.aten._fused_adamw_(
            *tensors,
            [],
            [updates] * len(params),
            lr=group["lr"],
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=inverse,
        )

    def _sliced(
        self,
        group: dict[str, Any],
        grad_scale: float,
        param: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> None:
        float32 = param.dtype == grad.dtype == torch.float32
        if float32 and cpp_kernels().supports(param, grad, first):
            beta1, beta2 = self.betas
            rates = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            corrections = (1 - beta1**self.updates, 1 - beta2**self.updates)
            tensors = (param, grad.contiguous(), first, second)
            sizes = (param.numel(), *rates, *corrections, float(grad_scale))
            cpp_kernels().call("adamw", first.dtype, *tensors, *sizes)
            return
        chunk = self.chunk or (CHUNK if param.device.type == "cpu" else CHUNK_ON_GPU)
        size = min(chunk, param.numel())
        wide_first, wide_second = torch.empty(2, size, dtype=param.dtype, device=param.device)
        slices = (t.view(-1).split(chunk) for t in (param, grad.contiguous(), first, second))
        for p, g, m, v in zip(*slices, strict=True):
            wide_m = wide_first[: p.numel()].copy_(m)
            wide_v = wide_second[: p.numel()].copy_(v)
            self._fused(group, grad_scale, [p], [g], [wide_m], [wide_v])
            m.copy_(wide_m)
            v.copy_(wide_v)
