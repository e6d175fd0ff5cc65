"""Sparse layers with one thing changed, for `studies/levers.py`: edits of a built model.

Each is a subclass whose `split` or `merge` differs, with its costs beside it; `change` turns the
sparse layers of a model into it, on the meta device too."""

import hashlib
import inspect
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.lab.experiment import Edit
from headway.model.costs import Cost, CostGroup, Term, Workload
from headway.model.linear import Linear, RMSNorm
from headway.model.moe import Experts, SparseLayer
from headway.model.roles import Group, Init, Role, StoresByRole
from headway.model.transformer import Transformer


class Changed(SparseLayer):
    """A sparse layer after `prepare`."""

    w_in: Linear | None
    w_out: Linear | None
    norm: RMSNorm | None
    extra: tuple[float, float]
    """Weights, and FLOPs per token of forward, that are added to its costs."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        """Change the layer in its place of a model.

        Args:
            like: a tensor of the model, for the device of new ones."""

    def costs(self, work: Workload) -> Sequence[Cost]:
        weights, flops = self.extra
        more = Cost(CostGroup.LATENT, Term(weights, "weights"), Term(flops, "FLOPs"))
        return [*super().costs(work), more]


def change(kind: type[Changed]) -> Edit:
    """Return the edit that turns all sparse layers into layers of a kind. The hash of its source is
    part of the edit, and so of the names of its runs."""
    source = inspect.getsource(kind).encode()
    return partial(_change, kind.__name__, hashlib.sha256(source).hexdigest()[:12])


def _change(name: str, _source: str, model: Transformer) -> None:
    kind = next(k for k in Changed.__subclasses__() if k.__name__ == name)
    like = model.norm.weight
    for place, layer in enumerate(model.sparse_layers()):
        layer.__class__ = kind
        assert isinstance(layer, Changed)
        layer.extra = (0.0, 0.0)
        layer.prepare(place, model.config.n_layers, like)
    if kind is Shared:
        first, layers = model.sparse_layers()[0], model.sparse_layers()
        assert first.w_in is not None and first.w_out is not None
        for layer in layers:
            assert isinstance(layer, Shared)
            layer.of = (first.w_in, first.w_out)


def _generator(place: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + place)


def _draw(shape: Sequence[int], std: float, place: int, like: Tensor) -> nn.Parameter:
    """Return a new parameter, on the device of `like`."""
    value = torch.randn(*shape, generator=_generator(place)) * std
    return nn.Parameter(value.to(like.device))


class Permuted(Changed):
    """Slices of the input under a fixed permutation of each layer, undone behind."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.norm is not None
        order_D = torch.randperm(self.norm.weight.numel(), generator=_generator(place))
        self.order_D, self.back_D = order_D, order_D.argsort()

    def split(self, x_TD: Tensor) -> Tensor:
        return super().split(x_TD[:, self.order_D])

    def merge(self, y_THL: Tensor) -> Tensor:
        return y_THL.flatten(1)[:, self.back_D]


class Rotated(Changed):
    """Slices of the input under a fixed rotation, signs and then a Hadamard matrix in two Kronecker
    factors; its transpose behind. Other signs in each layer."""

    scaled = False
    """With a learned diagonal before and after each."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.norm is not None
        D = self.norm.weight.numel()
        a = 2 ** (int(math.log2(D)) // 2)
        self.factors = (_hadamard(a), _hadamard(D // a))
        self.sign_D = torch.randint(0, 2, (D,), generator=_generator(place)) * 2.0 - 1.0
        self.extra = (4.0 * D * self.scaled, 4.0 * D * (a + D // a) + 4.0 * D * self.scaled)
        self.diagonals = Diagonals(D, like) if self.scaled else None

    def split(self, x_TD: Tensor) -> Tensor:
        first, last, *_ = self._diagonals(x_TD)
        a_AA, b_BB = (f.to(x_TD.dtype) for f in self.factors)
        x_TAB = (first * x_TD * self.sign_D.to(x_TD.dtype)).unflatten(1, (len(a_AA), len(b_BB)))
        return super().split(last * (a_AA @ x_TAB @ b_BB).flatten(1))

    def merge(self, y_THL: Tensor) -> Tensor:
        y_TD = y_THL.flatten(1)
        *_, first, last = self._diagonals(y_TD)
        a_AA, b_BB = (f.to(y_TD.dtype) for f in self.factors)  # symmetric: their own transposes
        y_TAB = (first * y_TD).unflatten(1, (len(a_AA), len(b_BB)))
        return last * (a_AA @ y_TAB @ b_BB).flatten(1) * self.sign_D.to(y_TD.dtype)

    def _diagonals(self, x: Tensor) -> Sequence[Tensor | float]:
        return (1.0,) * 4 if self.diagonals is None else self.diagonals.weight.to(x.dtype).unbind()


class RotatedScaled(Rotated, Changed):
    """`Rotated` with learned diagonals."""

    scaled = True


class Diagonals(StoresByRole):
    """Four learned diagonals, ones at first."""

    def __init__(self, width: int, like: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, width, device=like.device))

    def roles(self) -> dict[str, Role]:
        return {"weight": Role(Group.VECTOR, Init.ONES)}


def _hadamard(n: int) -> Tensor:
    """Return the Hadamard matrix of a power of two, orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / math.sqrt(n)


class InOnly(Changed):
    """A learned W_in, and nothing behind the experts."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        D_L, D = self.w_in.weight.shape
        self.w_out, self.extra = None, (-D * D_L, -2 * D * D_L)
        assert isinstance(self.experts, Experts)
        self.experts.w_out_HEFL.mul_(1 / math.sqrt(2 * n_layers))  # the end of the branch now


class OutOnly(Changed):
    """Slices of the input, and a learned W_out."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        D_L, D = self.w_in.weight.shape
        self.w_in, self.extra = None, (D * D_L, 2 * D * D_L)


class BlockDiagonal(StoresByRole):
    """A matrix of two block-diagonal factors with a shuffle between (Monarch, arXiv 2204.00595)."""

    def __init__(self, width: int, scale: float, place: int, like: Tensor):
        super().__init__()
        a = 2 ** (int(math.log2(width)) // 2)
        b = width // a
        self.first_ABB = _draw((a, b, b), b**-0.5, place, like)
        self.second_BAA = _draw((b, a, a), scale * a**-0.5, place + 500, like)

    def roles(self) -> dict[str, Role]:
        a, b = self.first_ABB.shape[:2]
        return {"first_ABB": Role(fan_in=b), "second_BAA": Role(fan_in=a)}

    def forward(self, x_TD: Tensor) -> Tensor:
        first, second = self.first_ABB.to(x_TD.dtype), self.second_BAA.to(x_TD.dtype)
        x_TAB = torch.einsum("tab,acb->tac", x_TD.unflatten(1, first.shape[:2]), first)
        return torch.einsum("tab,bca->tcb", x_TAB, second).flatten(1)


class Monarch(Changed):
    """W_in and W_out are `BlockDiagonal`."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        D = self.w_in.weight.shape[1]
        self.factor_in = BlockDiagonal(D, 1.0, place, like)
        self.factor_out = BlockDiagonal(D, (2 * n_layers) ** -0.5, place + 100, like)
        self.w_in = self.w_out = None
        n = sum(p.numel() for p in (*self.factor_in.parameters(), *self.factor_out.parameters()))
        self.extra = (n, 2 * n)

    def split(self, x_TD: Tensor) -> Tensor:
        return super().split(self.factor_in(x_TD))

    def merge(self, y_THL: Tensor) -> Tensor:
        return self.factor_out(y_THL.flatten(1))


class Orthogonal(Changed):
    """W_in orthogonal and W_out its transpose, at step 0."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None and self.w_out is not None
        if like.is_meta:
            return
        nn.init.orthogonal_(self.w_in.weight, generator=_generator(place))
        self.w_out.weight.copy_(self.w_in.weight.t() / math.sqrt(2 * n_layers))


class Tied(Changed):
    """W_out is the transpose of W_in for good, scaled as the end of a branch."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        self.w_out, self.scale = None, 1 / math.sqrt(2 * n_layers)
        self.extra = (-self.w_in.weight.numel(), 0.0)

    def merge(self, y_THL: Tensor) -> Tensor:
        assert self.w_in is not None
        y_TL = self.scale * y_THL.flatten(1)
        return F.linear(y_TL, self.w_in.weight.t().to(y_TL.dtype))


class Shared(Changed):
    """All layers use the W_in and the W_out of the first."""

    of: tuple[nn.Module, nn.Module]
    """Those of the first layer; a tuple, so that they are no parameters of this one."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        if place:
            self.extra = (0.0, 4.0 * self.w_in.weight.numel())
            self.w_in = self.w_out = None

    def split(self, x_TD: Tensor) -> Tensor:
        assert self.norm is not None
        return self.norm(self.of[0](x_TD).unflatten(-1, (self.n_heads, -1)))

    def merge(self, y_THL: Tensor) -> Tensor:
        return self.of[1](y_THL.flatten(1))


class Gelu(Changed):
    """GELU between W_in and the norm: a hidden layer, not a product of two matrices."""

    def split(self, x_TD: Tensor) -> Tensor:
        assert self.w_in is not None and self.norm is not None
        return self.norm(F.gelu(self.w_in(x_TD)).unflatten(-1, (self.n_heads, -1)))


class HeadGates(Changed):
    """y_h is multiplied by a sigmoid gate of the token."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        D = self.w_in.weight.shape[1]
        self.gate = Linear(D, self.n_heads)
        self.gate.weight = _draw((self.n_heads, D), D**-0.5, place, like)
        self.extra = (self.n_heads * D, 2.0 * self.n_heads * D)

    def split(self, x_TD: Tensor) -> Tensor:
        self.gate_TH = self.gate(x_TD).sigmoid()
        return super().split(x_TD)

    def merge(self, y_THL: Tensor) -> Tensor:
        return super().merge(2 * self.gate_TH.unsqueeze(-1) * y_THL)


class OutputNorm(Changed):
    """RMSNorm on the combined output, its weights scaled with depth."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        assert self.w_in is not None
        D = self.w_in.weight.shape[1]
        self.norm_out = RMSNorm(D)
        weight = torch.full((D,), 1 / math.sqrt(2 * n_layers), device=like.device)
        self.norm_out.weight, self.extra = nn.Parameter(weight), (D, 0.0)

    def merge(self, y_THL: Tensor) -> Tensor:
        return self.norm_out(super().merge(y_THL))


class FixedScale(Changed):
    """Sub-tokens are scaled by 4 and not normed."""

    def prepare(self, place: int, n_layers: int, like: Tensor) -> None:
        self.norm = None

    def split(self, x_TD: Tensor) -> Tensor:
        return 4 * super().split(x_TD)
