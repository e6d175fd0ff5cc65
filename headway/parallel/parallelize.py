"""Put a model on a mesh: which rank holds which part of it, and how its tokens are exchanged."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from headway.model.dispatch import LOCAL, TokenDispatcher
from headway.model.transformer import Transformer
from headway.parallel.dispatcher import MeshDispatcher, ep_scheme
from headway.parallel.fsdp import apply_fsdp
from headway.parallel.mesh import Mesh
from headway.parallel.placement import Sharding, partition, to_local


@dataclass(frozen=True)
class Parallelism:
    """A model on a mesh: the placement of its tensors and the exchange of its tokens."""

    sharding: Sharding
    dispatcher: TokenDispatcher

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        return self.sharding.mesh


SINGLE_PROCESS = Parallelism(Sharding(Mesh(), {}), LOCAL)


def parallelize(model: Transformer, mesh: Mesh) -> Parallelism:
    """Replace the tensors of a full model by the parts that this rank holds, in place."""
    if mesh.size == 1:
        return Parallelism(Sharding(mesh, {}), LOCAL)
    # 0 is resolved by who knows the nodes (`train.resolve`); elsewhere it means one chunk
    n_chunks = max(mesh.config.chunks, 1)
    dispatcher = MeshDispatcher(mesh, n_chunks, ep_scheme(mesh.config, model.config.moe.top_k))
    return Parallelism(apply_fsdp(model, partition(model, mesh)), dispatcher)


def materialize(
    model: Transformer,
    mesh: Mesh,
    seed: int,
    init_scales: Mapping[str, float] = MappingProxyType({}),
) -> Parallelism:
    """Parallelise a full model that was built on the meta device, and give this rank's part the
    initial values that a single process would draw, times `init_scales` of their names. At most one
    full parameter is in memory at a time."""
    initial = model.initial(seed)
    parallelism = parallelize(model, mesh)
    model.to_empty(device=mesh.device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, full in initial:
            if name in init_scales:
                full.mul_(init_scales[name])
            to_local(tensors[name]).copy_(parallelism.sharding.local_view(name, full))
    return parallelism
