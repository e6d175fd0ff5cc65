"""Sharded parameters: FSDP2 (`torch.distributed.fsdp.fully_shard`) on a partitioned model.

With `mesh.shard` other than `replicate`, parameters that several ranks hold alike are sharded over
these ranks, with their gradients and optimiser states. A block's parameters are all-gathered before
its forward and again before its backward, and its gradients are reduce-scattered while backward
continues:

| part of the model | `fsdp`: sharded over | `hsdp`: sharded over | and replicated over |
|---|---|---|---|
| experts | dp | | dp |
| norms and routers | | | as without FSDP |
| everything else | dp × hp × ep | hp × ep | dp |

Norms and routers are used in float32 and are small, a few MiB per layer: they stay replicated, and
`reduce.summed_gradients` sums their gradients (and with `hsdp` the experts'). Everything else is
used in the dtype of the matmuls and is communicated in it, so that an all-gather in bfloat16 sends
half the bytes and changes no bit of the result. Gradients are summed in float32. A rank's loss is
its part of a global sum, so FSDP too must sum and not average.

Every collective is in the mesh's ledger, counted when it is issued: its bytes are computed from the
size of the message as a ring would send them, not observed.

Parameters are plain tensors within `forward` and DTensors outside; `placement.to_local` returns the
shard. Stacked experts are sharded between matrices where their numbers allow, so that
Muon finds full matrices (picture: `placement.py`)."""

import warnings
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import Shard

from headway.model.roles import DeclaresRoles, Group, SplitOver, roles_of
from headway.model.transformer import Transformer
from headway.parallel.collectives import CommContext
from headway.parallel.mesh import Axis, Mesh
from headway.parallel.placement import Sharding, ShardSpec
from headway.parallel.reduce import ring_bytes


def apply_fsdp(model: Transformer, sharding: Sharding) -> Sharding:
    """Shard a partitioned model in place, as `mesh.shard` says; return the new placements."""
    mesh = sharding.mesh
    kind = mesh.config.shard
    if kind == "replicate" or mesh.size == 1:
        return sharding
    assert mesh.device_mesh is not None
    device_mesh, axis = _block_mesh(mesh)
    shards: dict[str, ShardSpec] = {}
    not_sharded: set[nn.Parameter] = set()
    roles = roles_of(model)
    for name, p in model.named_parameters():
        float32 = roles[name].group in (Group.VECTOR, Group.ROUTER)
        if sharding.placements[name].replicas is mesh.world and not float32:
            shards[name] = ShardSpec(0, p.shape[0], axis)
        else:
            not_sharded.add(p)
    for i, block in enumerate(model.blocks()):
        for prefix, experts in _experts_of(block) if kind == "fsdp" and mesh.dp.size > 1 else ():
            expert_shards = _shard_experts(experts, mesh, model.dtype, i)
            shards |= {f"layers.{i}.{prefix}.{k}": spec for k, spec in expert_shards.items()}
        # layers cast their weights to the dtype of the matmul, which then costs nothing
        stored = next(block.parameters()).dtype
        policy = MixedPrecisionPolicy(model.dtype, stored, cast_forward_inputs=False)
        fully_shard(block, mesh=device_mesh, mp_policy=policy, ignored_params=not_sharded)
        _use_counted_sums(block, axis, mesh, model.dtype, i)
    fully_shard(model, mesh=device_mesh, ignored_params=not_sharded)
    _use_counted_sums(model, axis, mesh, model.dtype, None)
    first = kind == "fsdp" or mesh.dp.index == 0
    placements = {
        name: replace(placement, first=first, shard=shards[name]) if name in shards else placement
        for name, placement in sharding.placements.items()
    }
    return Sharding(mesh, placements)


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP keeps gathered after a forward pass without backward: embedding
    and head, which training would use again at once."""
    if isinstance(model, FSDPModule):
        model.reshard()


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Call before each backward pass. Gradients are reduce-scattered after every micro-batch, so
    that they stay sharded, and all-reduced over the replicas of `hsdp` after the last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def _block_mesh(mesh: Mesh) -> tuple[DeviceMesh, Axis]:
    """Return FSDP's device mesh for replicated parameters, and the axis that shards them."""
    kind, size = mesh.device.type, mesh.size // mesh.dp.size
    if mesh.config.shard == "fsdp":
        return init_device_mesh(kind, (mesh.size,), mesh_dim_names=("world",)), mesh.world
    both = init_device_mesh(kind, (mesh.dp.size, size), mesh_dim_names=("dp", "replica"))
    return both, Axis("replica", size, mesh.rank % size, both.get_group("replica"))


def _experts_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a block whose parameters are split over heads and experts, by name."""

    def has_experts(module: nn.Module) -> bool:
        roles = module.roles().values() if isinstance(module, DeclaresRoles) else ()
        return any(role.shard is SplitOver.EXPERTS for role in roles)

    return [(name, module) for name, module in block.named_modules() if has_experts(module)]


def _shard_experts(
    experts: nn.Module, mesh: Mesh, dtype: torch.dtype, layer: int
) -> dict[str, ShardSpec]:
    """Shard `[H, E, …, F, L]` over dp: between heads, else between experts, else along F."""
    assert mesh.device_mesh is not None
    size = mesh.dp.size

    shards: dict[str, ShardSpec] = {}
    dim_of: dict[nn.Parameter, int] = {}
    for name, p in experts.named_parameters():
        # FSDP2 allows uneven shards along dim 0 only
        dim = next((dim for dim in (0, 1, p.ndim - 2) if p.shape[dim] % size == 0), 0)
        shards[name], dim_of[p] = ShardSpec(dim, p.shape[dim], mesh.dp), dim
    # the output is a view, and nothing writes to it in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .*Experts.* returned a view")
    fully_shard(
        experts,
        mesh=mesh.device_mesh["dp"],
        reshard_after_forward=True,
        shard_placement_fn=lambda p: Shard(dim_of[p]),
    )
    _use_counted_sums(experts, mesh.dp, mesh, dtype, layer)
    return shards


def _use_counted_sums(
    module: nn.Module, axis: Axis, mesh: Mesh, dtype: torch.dtype, layer: int | None
) -> None:
    """Make FSDP sum gradients instead of averaging them, and count its collectives."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no average; NCCL loses nothing
    gather = CommContext(axis, mesh.traffic, "fsdp all-gather", layer)
    module.set_custom_all_gather(_CountedAllGather(gather, dtype))
    scatter = CommContext(axis, mesh.traffic, "fsdp reduce-scatter", layer)
    module.set_custom_reduce_scatter(_CountedReduceScatter(scatter))
    if mesh.config.shard == "hsdp":
        comm = CommContext(mesh.dp, mesh.traffic, "fsdp all-reduce", layer)
        # called when FSDP has just issued the all-reduce over the replicas
        module.set_all_reduce_hook(lambda reduced: comm.add(ring_bytes(reduced, mesh.dp)))


class _CountedAllGather(DefaultAllGather):
    """FSDP's all-gather, counted, communicated in `dtype`. Experts, embedding and head are stored
    in float32 and handed over in float32: they are cast where they are used, and their gradients,
    which are summed over rows there, have the dtype in which they were handed over."""

    def __init__(self, comm: CommContext, dtype: torch.dtype) -> None:
        self.comm, self.dtype = comm, dtype

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        sent, received = input_tensor, output_tensor
        if compress := self.dtype.itemsize < sent.dtype.itemsize:
            assert not async_op
            sent = sent.to(self.dtype)
            received = sent.new_empty(output_tensor.shape)
        self.comm.add((self.comm.axis.size - 1) * sent.nbytes)
        work = super().__call__(received, sent, group, async_op)
        if compress:
            output_tensor.copy_(received)
        return work


class _CountedReduceScatter(DefaultReduceScatter):
    """FSDP's reduce-scatter, counted."""

    def __init__(self, comm: CommContext) -> None:
        self.comm = comm

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work:
        self.comm.add((self.comm.axis.size - 1) * output_tensor.nbytes)
        assert op == dist.ReduceOp.SUM
        return super().__call__(output_tensor, input_tensor, group, op, async_op)
