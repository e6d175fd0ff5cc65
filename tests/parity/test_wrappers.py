"""The layers in a training loop that is not ours: DistributedDataParallel and FSDP2 of two ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from headway import BalanceConfig, LatentMoE, MoE, MultiHeadLatentMoE
from headway.config import MeshConfig
from tests.compare import assert_close

STEPS, ROWS = 3, 12
BALANCE = BalanceConfig(aux=0.0)


def build(kind: str, dtype: torch.dtype) -> MoE:
    torch.manual_seed(0)
    if kind == "moe":
        return MoE(16, 5, 2, 6, balance=BALANCE).to(dtype)
    if kind == "latent":
        return LatentMoE(16, 8, 5, 2, 6, d_shared=7, balance=BALANCE).to(dtype)
    return MultiHeadLatentMoE(16, 2, 5, 2, 6, balance=BALANCE).to(dtype)


def trained(layer: torch.nn.Module, rank: int, size: int, dtype: torch.dtype) -> None:
    """Some steps of a loop as anybody writes it; every rank has its rows of the same batches."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    drawn = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randn(ROWS, 16, generator=drawn).to(dtype)
        mine = batch.chunk(size)[rank]
        out, stats = layer(mine)
        loss = (out.float() - mine.float()).square().mean() + 0.1 * stats.z_H.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(layer: torch.nn.Module) -> dict[str, Tensor]:
    """Whole."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}


def in_ddp(mesh, kind: str) -> dict[str, Tensor]:
    layer = build(kind, torch.float64)
    trained(DistributedDataParallel(layer), dist.get_rank(), 2, torch.float64)
    return weights(layer)


def in_fsdp(mesh, kind: str, narrow: bool) -> dict[str, Tensor]:
    layer = build(kind, torch.float32 if narrow else torch.float64)
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32) if narrow else MixedPrecisionPolicy()
    )
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    trained(layer, dist.get_rank(), 2, torch.float32 if narrow else torch.float64)
    return weights(layer)


@pytest.fixture(scope="module")
def alone():
    """Weights that one process learns, in float64."""
    trained_weights = {}
    for kind in ("moe", "latent", "multi_head"):
        layer = build(kind, torch.float64)
        trained(layer, 0, 1, torch.float64)
        trained_weights[kind] = weights(layer)
    return trained_weights


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
@pytest.mark.parametrize("wrapped", [(in_ddp,), (in_fsdp, False)], ids=["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(ranks, alone, kind, wrapped):
    function, *options = wrapped
    for answer in ranks.run(MeshConfig(dp=2), function, kind, *options):
        assert set(answer) == set(alone[kind])
        for name, value in answer.items():
            assert_close(value, alone[kind][name], 1e-12)


@pytest.mark.parametrize("kind", ["moe", "latent", "multi_head"])
def test_fsdp2_with_weights_and_tokens_in_bfloat16(ranks, alone, kind):
    """Its mixed precision gathers bfloat16 weights, which the layer multiplies as they are."""
    first, second = ranks.run(MeshConfig(dp=2), in_fsdp, kind, True)
    start = weights(build(kind, torch.float64))
    for name, value in first.items():
        assert value.dtype == torch.float32 and torch.equal(value, second[name])
        moved, want = value.double() - start[name], alone[kind][name] - start[name]
        assert_close(moved, want, 3e-2)


def rerouted(mesh, kind: str, apart: bool) -> float:
    """The share of sub-tokens that choose other experts than by the float32 weights, under FSDP2's
    mixed precision; `apart`: with the router in a group of its own, in float32."""
    torch.manual_seed(0)
    layer = MultiHeadLatentMoE(16, 2, 64, 4, 6) if kind == "multi_head" else MoE(16, 64, 4, 6)
    router, seen = copy.deepcopy(layer.router), []
    halves = init_device_mesh("cpu", (2,))
    if apart:
        fully_shard(
            layer.router, mesh=halves, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
        )
    fully_shard(layer, mesh=halves, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    layer.router.register_forward_hook(lambda _, given, route: seen.append((given[0], route)))
    layer(torch.randn(500, 16))
    ((read, route),) = seen
    return float((router(read.detach()).index_THK != route.index_THK).any(-1).float().mean())


@pytest.mark.parametrize("kind", ["moe", "multi_head"])
def test_fsdp2_with_a_router_in_float32(ranks, kind):
    """As docs/start.md says; a router of bfloat16 sends some elsewhere."""
    assert ranks.run(MeshConfig(dp=2), rerouted, kind, True) == [0.0, 0.0]
    assert min(ranks.run(MeshConfig(dp=2), rerouted, kind, False)) > 0
