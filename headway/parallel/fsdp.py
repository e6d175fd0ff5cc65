"""Parameters in pieces: FSDP2 (`torch.distributed.fsdp.fully_shard`) around a model that is split.

What several ranks hold alike need not lie whole on each of them. With `mesh.shard` other than
`replicate` a rank keeps one piece of every such parameter, with its gradient and its optimiser
state. A block's parameters are gathered when it begins, in forward and again in backward, and its
gradients are added up and cut while backward goes on:

| part of the model | `fsdp`: pieces over | `hsdp`: pieces over | and replicated over |
|---|---|---|---|
| experts | dp | | dp |
| norms and routers | | | as without FSDP |
| everything else | dp × hp × ep | hp × ep | dp |

Norms and routers are used in float32 and small, a few MiB per layer: they stay whole, and
`reduce.summed_gradients` adds up their gradients (and with `hsdp` the experts'). All the rest is
used in the dtype of the matmuls and travels in it, so that a gather in bfloat16 sends half the
bytes and changes no bit of the result. Gradients are added up in float32. A loss is one rank's part
of a global sum, so FSDP too must add up, and divide nothing.

Every collective is in the mesh's ledger, counted when it is issued: its bytes are computed from the
size of the message as a ring would send them, not observed on the wire.

Parameters are plain tensors within `forward` and `step`, and DTensors outside; `shard.local` gives
the piece. Stacked experts are cut between matrices where their numbers allow, so that Muon finds
every matrix whole.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import Shard

try:
    from torch.distributed import all_gather_single as _all_gather
    from torch.distributed import reduce_scatter_single as _reduce_scatter
except ImportError:  # before torch 2.13
    from torch.distributed import all_gather_into_tensor as _all_gather
    from torch.distributed import reduce_scatter_tensor as _reduce_scatter

from headway.model.experts import Experts
from headway.model.linear import RMSNorm
from headway.model.moe import MoE
from headway.model.router import Router
from headway.model.transformer import Transformer
from headway.parallel.collectives import CommContext
from headway.parallel.mesh import Axis, Mesh
from headway.parallel.placement import Sharding, ShardSpec
from headway.parallel.traffic import Traffic


def shard(model: Transformer, sharding: Sharding) -> Sharding:
    """Cuts the parameters of a split model into pieces, in place, as `mesh.shard` wants it, and
    says where they lie now."""
    mesh = sharding.mesh
    kind = mesh.config.shard
    if kind == "replicate" or mesh.size == 1:
        return sharding
    assert mesh.device_mesh is not None
    device_mesh, axis = _ranks_of_blocks(mesh)
    cuts: dict[str, ShardSpec] = {}
    whole: set[nn.Parameter] = set()
    small = {p for m in model.modules() if isinstance(m, RMSNorm | Router) for p in m.parameters()}
    for name, p in model.named_parameters():
        if sharding.placements[name].replicas is mesh.world and p not in small:
            cuts[name] = ShardSpec(0, p.shape[0], axis)
        else:
            whole.add(p)
    for i, block in enumerate(model.blocks()):
        if kind == "fsdp" and mesh.dp.size > 1 and isinstance(block.ffn, MoE):
            found = _cut_experts(block.ffn.experts, mesh, model.dtype, i)
            cuts |= {f"layers.{i}.ffn.experts.{name}": pieces for name, pieces in found.items()}
        # its layers cast their weights to the dtype of the matmul, which is then no work
        policy = MixedPrecisionPolicy(model.dtype, _stored(block), cast_forward_inputs=False)
        fully_shard(block, mesh=device_mesh, mp_policy=policy, ignored_params=whole)
        register_fsdp_forward_method(block, "step")
        _add_up(block, axis, mesh, model.dtype, i)
    fully_shard(model, mesh=device_mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "step")
    _add_up(model, axis, mesh, model.dtype, None)
    first = mesh.dp.index == 0 if kind == "hsdp" else True
    placements = {
        name: replace(old, first=first, pieces=cuts[name]) if name in cuts else old
        for name, old in sharding.placements.items()
    }
    return Sharding(mesh, placements)


def reshard(model: nn.Module) -> None:
    """Frees what FSDP keeps gathered after a forward pass without backward: the embedding and the
    head, which training needs at once again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Before each backward. Gradients are added up over the ranks that share a parameter after
    every micro-batch, so that they never lie whole; over the replicas of `hsdp` after the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def _ranks_of_blocks(mesh: Mesh) -> tuple[DeviceMesh, Axis]:
    """Over whom replicated parameters are cut: FSDP's mesh, and the axis of the pieces."""
    kind, size = mesh.device.type, mesh.size // mesh.dp.size
    if mesh.config.shard == "fsdp":
        return init_device_mesh(kind, (mesh.size,), mesh_dim_names=("world",)), mesh.world
    both = init_device_mesh(kind, (mesh.dp.size, size), mesh_dim_names=("dp", "replica"))
    return both, Axis("replica", size, mesh.rank % size, both.get_group("replica"))


def _cut_experts(
    experts: Experts, mesh: Mesh, dtype: torch.dtype, layer: int
) -> dict[str, ShardSpec]:
    """Experts are cut over dp: between heads, else between experts, else within them."""
    assert mesh.device_mesh is not None
    size = mesh.dp.size
    H, E, _, F, _ = experts.w_in_HEGFL.shape
    # uneven pieces are possible along dim 0 alone
    within = (3, 2) if F % size == 0 else (0, 0)
    dims = (0, 0) if H % size == 0 else (1, 1) if E % size == 0 else within
    of = {experts.w_in_HEGFL: dims[0], experts.w_out_HEFL: dims[1]}
    cuts = {
        name: ShardSpec(of[p], p.shape[of[p]], mesh.dp) for name, p in experts.named_parameters()
    }
    # a view, and nothing writes to it in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .*Experts.* returned a view")
    fully_shard(
        experts,
        mesh=mesh.device_mesh["dp"],
        reshard_after_forward=True,
        shard_placement_fn=lambda p: Shard(of[p]),
    )
    _add_up(experts, mesh.dp, mesh, dtype, layer)
    return cuts


def _stored(module: nn.Module) -> torch.dtype:
    """Of the parameters."""
    return next(module.parameters()).dtype


def _add_up(
    module: nn.Module, axis: Axis, mesh: Mesh, dtype: torch.dtype, layer: int | None
) -> None:
    """Sums in place of FSDP's means, and every collective in the ledger."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no other; on NCCL nothing is lost
    module.set_custom_all_gather(_Gather(axis, mesh.traffic, dtype, layer))
    module.set_custom_reduce_scatter(_Scatter(axis, mesh.traffic, layer))
    if mesh.config.shard == "hsdp":
        module.set_all_reduce_hook(_Replicas(mesh.dp, mesh.traffic, layer))


class _Buffers:
    """Memory for a collective, from torch's allocator."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Buffers, AllGather):
    """FSDP's all-gather, counted, in `dtype` on the wire.

    Experts, embedding and head are stored and arrive in float32: they are cast where they are used,
    and their gradients, which add up over rows there, come in the dtype in which they arrived.
    """

    def __init__(self, axis: Axis, traffic: Traffic, dtype: torch.dtype, layer: int | None) -> None:
        self.wire, self.dtype = CommContext(axis, traffic, "fsdp all-gather", layer), dtype

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        sent, received = input_tensor, output_tensor
        if narrow := self.dtype.itemsize < sent.dtype.itemsize:
            assert not async_op
            sent = sent.to(self.dtype)
            received = sent.new_empty(output_tensor.shape)
        self.wire.add((self.wire.axis.size - 1) * sent.nbytes)
        work = _all_gather(received, sent, group=group, async_op=async_op)
        if narrow:
            output_tensor.copy_(received)
        return work


class _Scatter(_Buffers, ReduceScatter):
    """FSDP's reduce-scatter, counted."""

    def __init__(self, axis: Axis, traffic: Traffic, layer: int | None) -> None:
        self.wire = CommContext(axis, traffic, "fsdp reduce-scatter", layer)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.wire.add((self.wire.axis.size - 1) * output_tensor.nbytes)
        assert op == dist.ReduceOp.SUM
        return _reduce_scatter(output_tensor, input_tensor, group=group, async_op=async_op)


class _Replicas:
    """Counts the all-reduce of `hsdp` over the replicas, which FSDP has just issued."""

    def __init__(self, axis: Axis, traffic: Traffic, layer: int | None) -> None:
        self.wire = CommContext(axis, traffic, "fsdp all-reduce", layer)

    def __call__(self, reduced: Tensor) -> None:
        size = self.wire.axis.size
        self.wire.add(2 * (size - 1) * reduced.nbytes // size)
