"""Which part of a parameter or buffer lies on which rank.

Every tensor has a global name and a global shape, whatever the mesh; a rank holds a slice of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headway.model.moe import MoE
from headway.model.transformer import Transformer
from headway.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class ShardSpec:
    """How FSDP cuts a slice further: rows of one dim, in equal pieces of which the last may be
    shorter or empty (`torch.chunk`)."""

    dim: int
    rows: int
    """Of the slice, along `dim`."""
    axis: Axis

    @property
    def each(self) -> int:
        """Rows of every piece but the last."""
        return -(-self.rows // self.axis.size)

    def length(self, index: int) -> int:
        """Rows of one piece."""
        return max(0, min(self.each, self.rows - index * self.each))

    @property
    def start(self) -> int:
        """First row of this rank's piece."""
        return min(self.axis.index * self.each, self.rows)

    def local(self, x: Tensor) -> Tensor:
        """This rank's piece, a view."""
        return x.narrow(self.dim, self.start, self.length(self.axis.index))


@dataclass(frozen=True)
class Placement:
    """Of one tensor."""

    axes: tuple[Axis, ...]
    """Dim i is split evenly over axes[i]; further dims are whole."""
    replicas: Axis
    """The ranks that hold the same slice; their gradients are added up."""
    first: bool
    """Whether this rank is the first of them: it counts the slice in global sums."""
    pieces: ShardSpec | None = None
    """How FSDP cuts the slice. It then adds up the gradients itself."""

    def slice(self, whole: Tensor) -> Tensor:
        """This rank's slice before FSDP cuts it, a view."""
        for dim, axis in enumerate(self.axes):
            each = whole.shape[dim] // axis.size
            whole = whole.narrow(dim, axis.index * each, each)
        return whole

    def local(self, whole: Tensor) -> Tensor:
        """What of a whole tensor lies on this rank, a view."""
        part = self.slice(whole)
        return part if self.pieces is None else self.pieces.local(part)


@dataclass(frozen=True)
class Sharding:
    """The placement of every parameter and buffer of a model, by name."""

    mesh: Mesh
    placements: dict[str, Placement]

    def slice(self, name: str, whole: Tensor) -> Tensor:
        """What of a whole tensor lies here; a view."""
        placement = self.placements.get(name)
        return whole if placement is None else placement.local(whole)

    def local_heads(self, x: Tensor, layer: MoE) -> Tensor:
        """Of a statistic of all heads `[H, …]`, that of the heads whose router is here; a scalar as
        it is."""
        H = layer.router.w_HEL.shape[0]
        if not x.dim() or x.shape[0] == H:
            return x
        return x[self.mesh.hp.index * H : (self.mesh.hp.index + 1) * H]


def split(model: Transformer, mesh: Mesh) -> Sharding:
    """Leaves on this rank its slices of a whole model, in place, and says what lies where."""
    first = mesh.dp.index == 0
    whole = Placement((), mesh.world, mesh.rank == 0)
    experts = Placement((mesh.hp, mesh.ep), mesh.dp, first)
    routers = Placement((mesh.hp,), mesh.routers, mesh.routers.index == 0)
    placements = {name: whole for name, _ in _tensors(model)}
    for prefix, layer in model.named_modules():
        if not isinstance(layer, MoE):
            continue
        parts: list[tuple[str, nn.Module, Placement]] = [("experts", layer.experts, experts)]
        if mesh.hp.size > 1 and not layer.reads_token:
            parts.append(("router", layer.router, routers))
        for part, module, placement in parts:
            for name, tensor in _tensors(module):
                placements[f"{prefix}.{part}.{name}"] = placement
                with torch.no_grad():
                    # a copy, so that the memory of the whole is given back
                    tensor.set_(placement.local(tensor).clone())  # type: ignore[call-overload]
    return Sharding(mesh, placements)


def local(x: Tensor) -> Tensor:
    """What of a tensor lies in this process: all of a plain one, this rank's piece of one that FSDP
    has cut. It shares memory with `x`."""
    return x.to_local().detach() if isinstance(x, DTensor) else x


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
