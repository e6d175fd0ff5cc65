"""Small layers and their gradients, for the tests of what other people's code does with them."""

import pytest
import torch
from torch import Tensor, nn

from headway import LatentMoE, MoE, MultiHeadLatentMoE
from tests.compare import assert_close

KINDS = ["moe", "latent", "multi_head"]
D = 16


def build(kind: str, dtype: torch.dtype = torch.float32, n_experts: int = 5, **options) -> MoE:
    """A small layer, the same for all dtypes, with a selection bias that matters."""
    torch.manual_seed(0)
    if kind == "moe":
        layer = MoE(D, n_experts, 2, 6, d_shared=7, **options)
    elif kind == "latent":
        layer = LatentMoE(D, 8, n_experts, 2, 6, d_shared=7, **options)
    else:
        layer = MultiHeadLatentMoE(D, 2, n_experts, 2, 6, d_shared=7, **options)
    with torch.no_grad():
        layer.router.bias_HE.normal_(generator=torch.Generator().manual_seed(1))
    return layer.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def loss_of(found) -> Tensor:
    """A scalar that depends on everything a layer returns with a gradient, and is no constant."""
    out, stats = found
    return (
        out.square().sum()
        + stats.prob_HE.square().sum()
        + stats.z_H.sum()
        + out.flatten()[::3].sum()
    )


def gradients(layer: nn.Module, x: Tensor, call=None) -> list[Tensor]:
    """Of `loss_of`: x first, then every parameter."""
    x = x.detach().requires_grad_()
    names = dict(layer.named_parameters())
    loss = loss_of(layer(x) if call is None else call(x))
    return list(torch.autograd.grad(loss, [x, *names.values()]))


def equal(got, want, bound: float = 0.0) -> None:
    """All of them, bit for bit unless there is a bound."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) if bound == 0 else assert_close(a, b, bound) is None


each_kind = pytest.mark.parametrize("kind", KINDS)
