"""Muon for stacks of matrices (Keller Jordan 2024; scaling of arXiv 2502.16982, §2.2)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from headway.parallel.full_tensors import apply_to_full
from headway.parallel.placement import ShardSpec, to_local
from headway.parallel.traffic import Traffic

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero; as in torch.optim.Muon
STEPS = 5
EPS = 1e-7
CHUNK, CHUNK_ON_GPU = 1 << 20, 1 << 25
"""Elements that are orthogonalised at once: in a CPU's cache, and in few launches."""


def newton_schulz(g_NMN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a stack `[n, M, N]` with the singular values of every matrix pushed to about 1
    (0.5 … 1.5), in `dtype`: five steps of X ← aX + b(XXᵀ)X + c(XXᵀ)²X on the wide side. For n = 1
    these are torch.optim.Muon's operations."""
    a, b, c = COEFFICIENTS
    tall = g_NMN.size(-2) > g_NMN.size(-1)
    # Contiguous: a product into a transposed bfloat16 matrix is a thousand times slower on CPUs.
    x = (g_NMN.mT if tall else g_NMN).to(dtype, copy=True, memory_format=torch.contiguous_format)
    x.div_(x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS))
    gram, update = x.new_empty(2, *x.shape[:-1], x.shape[-2])
    following = torch.empty_like(x)
    for _ in range(STEPS):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=update)
        torch.baddbmm(x, update, x, beta=a, out=following)
        x, following = following, x
    return x.mT if tall else x


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))


def shape_factor(rows: int, columns: int, adjust: Literal["original", "match_rms_adamw"]) -> float:
    """Return the factor of the rate for a matrix with `rows` outputs and `columns` inputs."""
    match adjust:
        case "original":
            return math.sqrt(max(1, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix as the update, for parameters
    `[..., M, N]`.

    Every matrix of the last two dims is orthogonalised by itself, so a stack of experts is updated
    as separate experts would be. On 2-D parameters this is torch.optim.Muon, operation for
    operation.

    Args:
        params: parameters or groups of them, each with at least two dims. A group with
            `transposed=True` holds matrices stored [inputs, outputs], whose `original` factor is
            √max(1, columns/rows).
        lr, weight_decay: the decay is decoupled, p ← p·(1 − lr·weight_decay).
        momentum: of the running mean of gradients; `nesterov` looks one step ahead.
        adjust: see `shape_factor`.
        dtype: of Newton–Schulz. bfloat16 is enough, float32 where bfloat16 is not native (it is
            slow there).
        chunk: largest number of elements orthogonalised at once, those of several parameters with
            matrices of one shape; bounds the temporaries to about four times that. None: `CHUNK`,
            on GPUs `CHUNK_ON_GPU`.
        shards: parameters whose matrices are sharded over several ranks. Each is orthogonalised on
            one of them, and `step` is collective.
        traffic: counts what is sent for that."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust: Literal["original", "match_rms_adamw"] = "original",
        dtype: torch.dtype = torch.bfloat16,
        chunk: int | None = None,
        shards: Mapping[Tensor, ShardSpec] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "transposed": False})
        self.momentum, self.nesterov = momentum, nesterov
        self.adjust: Literal["original", "match_rms_adamw"] = adjust
        self.dtype, self.chunk = dtype, chunk
        self.shards, self.traffic = shards or {}, traffic or Traffic()
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon needs matrices and got a parameter of shape {p.shape}")

    @torch.no_grad()
    def step(self, grad_scale: float = 1.0) -> None:  # type: ignore[override]
        """Update with the gradients times `grad_scale` (the clip factor); they are not changed."""
        sharded: dict[str, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p in self.shards:
                    sharded.setdefault(self.shards[p].axis.name, []).append((p, group))
                else:
                    alike.setdefault((p.device, p.dtype, p.shape[-2:]), []).append(p)
            for parameters in alike.values():
                for batch in self._batches(parameters):
                    self._update(batch, group, grad_scale)
        for parameters in sharded.values():
            self._update_sharded(parameters, grad_scale)

    def init_state(self, p: Tensor) -> None:
        """Add a zero momentum for a parameter that has none yet."""
        if not self.state[p]:
            zeros = torch.zeros_like(to_local(p), memory_format=torch.contiguous_format)
            self.state[p]["momentum"] = zeros

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
        """Yield views `[n, M, N]` of parameters with matrices of one shape, of their gradients and
        momenta: of as many matrices as are orthogonalised at once."""
        rows, columns = parameters[0].shape[-2:]
        most = max(1, self._chunk(parameters[0].device) // (rows * columns))
        batch: list[tuple[Tensor, ...]] = []
        room = most
        for p in parameters:
            assert p.grad is not None
            tensors = (to_local(p), to_local(p.grad).contiguous(), self._momentum(p))
            n = tensors[0].numel() // (rows * columns)
            views = [t.view(n, rows, columns) for t in tensors]
            start = 0
            while start < n:
                end = min(n, start + room)
                batch.append(tuple(view[start:end] for view in views))
                start, room = end, room - (end - start)
                if not room:
                    yield batch
                    batch, room = [], most
        if batch:
            yield batch

    def _update(
        self, batch: list[tuple[Tensor, ...]], group: dict[str, Any], grad_scale: float
    ) -> None:
        """Update matrices of one shape that are not sharded: one iteration for all of them."""
        params, grads, momenta = (list(tensors) for tensors in zip(*batch, strict=True))
        stack = _stack(self._directions(grads, momenta, grad_scale))
        update = newton_schulz(stack, self.dtype)
        update = update.to(stack.dtype, memory_format=torch.contiguous_format)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        updates = update.split([len(p) for p in params])
        torch._foreach_add_(params, updates, alpha=-self._rate(params[0], group))

    def _update_sharded(
        self, parameters: list[tuple[Tensor, dict[str, Any]]], grad_scale: float
    ) -> None:
        """Update matrices sharded over the same ranks: as many at once as ranks, one on each."""
        parameters.sort(key=lambda item: -item[0].numel())  # so that ranks have equally much to do
        size = self.shards[parameters[0][0]].axis.size
        for i in range(0, len(parameters), size):
            batch = parameters[i : i + size]
            grads = [to_local(p.grad) for p, _ in batch if p.grad is not None]
            momenta = [self._momentum(p) for p, _ in batch]
            directions = self._directions(grads, momenta, grad_scale)
            specs = [self.shards[p] for p, _ in batch]
            updates = apply_to_full(
                directions, specs, self._newton_schulz, self.dtype, self.traffic, "muon"
            )
            for (p, group), update in zip(batch, updates, strict=True):
                to_local(p).mul_(1 - group["lr"] * group["weight_decay"])
                to_local(p).add_(update, alpha=-self._rate(p, group))

    def _newton_schulz(self, x: Tensor) -> Tensor:
        """Apply `newton_schulz` to a stack with any number of leading dims, in chunks."""
        rows, columns = x.shape[-2:]
        per_chunk = max(1, self._chunk(x.device) // (rows * columns))
        stack = x.reshape(-1, rows, columns).split(per_chunk)
        return torch.cat([newton_schulz(part, self.dtype) for part in stack]).view(x.shape)

    def _rate(self, p: Tensor, group: dict[str, Any]) -> float:
        rows, columns = p.shape[-2:]
        outs, ins = (columns, rows) if group["transposed"] else (rows, columns)
        return group["lr"] * shape_factor(outs, ins, self.adjust)

    def _momentum(self, p: Tensor) -> Tensor:
        self.init_state(p)
        return self.state[p]["momentum"]

    def _chunk(self, device: torch.device) -> int:
        if self.chunk is not None:
            return self.chunk
        return CHUNK if device.type == "cpu" else CHUNK_ON_GPU

    def _directions(
        self, grads: list[Tensor], momenta: list[Tensor], grad_scale: float
    ) -> Sequence[Tensor]:
        """Update the momenta; return what is to be orthogonalised."""
        if grad_scale != 1.0:
            grads = list(torch._foreach_mul(grads, grad_scale))
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        return torch._foreach_lerp(grads, momenta, self.momentum) if self.nesterov else momenta
