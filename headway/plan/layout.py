"""Placement of a model: every mesh of N ranks, why some cannot run it, what a rank holds.

Rank r has the coordinates dp = r // (HP·EP), hp = r // EP % HP, ep = r % EP. The batch is split
over all ranks: T = batch_size·seq_len / N tokens of a step on each.

| parameters | split over | replicated over |
|---|---|---|
| experts | heads over hp, experts of a head over ep | dp |
| routers that read their sub-token | heads over hp | dp × ep |
| everything else | | all N ranks |

With `shard` (FSDP) weights, gradients and optimiser state of all but norms and routers are also
sharded over the ranks that replicate them otherwise, and the weights are gathered where they are
used."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from headway.config import Config, ModelConfig, UsageError
from headway.config.bounds import alternatives, divisors
from headway.model.roles import Group, SplitOver
from headway.plan.cost import ModelCosts, Weights
from headway.plan.traffic import SCHEMES, Scheme, TokenExchange

AxisName = Literal["dp", "hp", "ep", "routers", "world"]


@dataclass(frozen=True)
class MeshLayout:
    """A mesh, the exchange on its `ep` axis, and whether replicas are sharded."""

    dp: int = 1
    hp: int = 1
    ep: int = 1
    scheme: Scheme | None = None
    """None where ep = 1."""
    shard: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.hp * self.ep

    @property
    def exchanges(self) -> dict[AxisName, TokenExchange]:
        """The exchanges of a sparse layer, by axis."""
        by_axis: dict[AxisName, TokenExchange] = {}
        if self.hp > 1:
            by_axis["hp"] = TokenExchange.HEADS
        if self.scheme and self.ep > 1:
            by_axis["ep"] = SCHEMES[self.scheme]
        return by_axis

    def size(self, axis: AxisName) -> int:
        """Return the ranks of an axis; `routers` are those that hold the same heads, dp × ep."""
        sizes = {"dp": self.dp, "hp": self.hp, "ep": self.ep, "routers": self.dp * self.ep}
        return sizes.get(axis, self.ranks)

    def in_one_node(self, axis: AxisName, per_node: int) -> bool:
        """Return whether every group of the axis is within one node of `per_node` ranks: the block
        of consecutive ranks that it spans must divide the node."""
        span = {"ep": self.ep, "hp": self.hp * self.ep}.get(axis, self.ranks)
        return self.ranks <= per_node or per_node % span == 0

    def __str__(self) -> str:
        return f"dp={self.dp},hp={self.hp},ep={self.ep}"


class ShareKind(Enum):
    """Parameters that are divided among ranks in the same way."""

    EMBEDDING = "embedding and head"
    REPLICATED = "replicated"
    SMALL = "norms and routers"
    ROUTERS = "routers"
    EXPERTS = "experts"


@dataclass(frozen=True)
class Share:
    """How parameters that are replicated over the same axis are divided among ranks."""

    kind: ShareKind
    axis: AxisName
    """The ranks that hold the same ones."""
    parts: int
    """Shards of all such parameters: hp for routers, hp·ep for experts."""
    gathers: int = 0
    """How often FSDP gathers them in a forward and backward pass; 0 where they are replicated."""


def share_of(weights: Weights, layout: MeshLayout) -> Share:
    """Return how parameters of one role are divided among ranks."""
    sharded = layout.shard
    if weights.shard is SplitOver.EXPERTS:
        return Share(ShareKind.EXPERTS, "dp", layout.hp * layout.ep, 2 if sharded else 0)
    if weights.shard is SplitOver.HEADS and layout.hp > 1:
        return Share(ShareKind.ROUTERS, "routers", layout.hp)
    if sharded and weights.group in (Group.VECTOR, Group.ROUTER):
        return Share(ShareKind.SMALL, "world", 1)
    if sharded and weights.group in (Group.EMBEDDING, Group.HEAD):
        return Share(ShareKind.EMBEDDING, "world", 1, 1)
    return Share(ShareKind.REPLICATED, "world", 1, 2 if sharded else 0)


def used(costs: ModelCosts, layout: MeshLayout) -> dict[Share, int]:
    """Return the number of parameters that one rank computes with, by how they are divided."""
    counts: dict[Share, int] = {}
    for weights in costs.weights:
        share = share_of(weights, layout)
        counts[share] = counts.get(share, 0) + weights.count // share.parts
    order = list(ShareKind)
    return dict(sorted(counts.items(), key=lambda entry: order.index(entry[0].kind)))


def stored(weights: Weights, layout: MeshLayout) -> float:
    """Return how many of these parameters one rank stores: those it uses, or with `shard` its shard
    of them."""
    share = share_of(weights, layout)
    return weights.count / share.parts / (layout.size(share.axis) if share.gathers else 1)


def meshes(n_ranks: int) -> Iterator[MeshLayout]:
    """Yield every dp × hp × ep of N ranks, legal or not."""
    for hp in divisors(n_ranks):
        for ep in divisors(n_ranks // hp):
            yield MeshLayout(n_ranks // (hp * ep), hp, ep)


def illegal(model: ModelConfig, layout: MeshLayout) -> str:
    """Return why a mesh cannot run the model, in a line; empty where it can."""
    moe, H, E = model.moe, model.moe.n_heads, model.moe.n_experts
    if layout.hp > 1 and (moe.kind != "multi_head_latent" or not model.n_sparse):
        kind = moe.kind if model.n_sparse else "dense"
        return f"hp needs multi_head_latent: hp={layout.hp} and kind={kind}"
    if H % layout.hp:
        return f"hp={layout.hp} does not divide n_heads={H}; use hp={alternatives(divisors(H))}"
    if layout.ep > 1 and not model.n_sparse:
        return f"ep needs experts: ep={layout.ep} and every layer is dense; use ep=1"
    if E % layout.ep:
        return f"ep={layout.ep} does not divide n_experts={E}; use ep={alternatives(divisors(E))}"
    return ""


def auto_chunks(layout: MeshLayout, per_node: int) -> tuple[int, str]:
    """Return what `mesh.chunks=0` becomes, and why: 2 where sub-tokens are dispatched to experts on
    other nodes, since most of a step is then communication. Head Parallel gains on slow links what
    it loses on fast ones (docs/cluster.md), and within a node two small exchanges cost more than
    they hide."""
    if layout.ep == 1:
        return 1, "no ep axis"
    if layout.scheme == "all_gather":
        return 1, f"ep={layout.ep} uses all-gather"
    if layout.in_one_node("ep", per_node):
        return 1, f"ep={layout.ep} is within a node"
    if layout.shard and layout.dp > 1:
        return 1, "fsdp would gather the experts once per chunk"
    return 2, f"ep={layout.ep} spans nodes: one half is sent while the other is computed"


def micro_batch(config: Config, n_ranks: int) -> tuple[int, int]:
    """Return (sequences of a forward pass, forward passes of a step) of one rank: the largest
    divisor of batch_size / N that is at most data.micro_batch_size, and the passes it needs.

    Raises UsageError where N ranks cannot share the batch, which no mesh of them can change."""
    batch = config.data.batch_size
    if batch % n_ranks:
        near = -(-batch // n_ranks) * n_ranks
        raise UsageError(
            f"data.batch_size={batch} does not divide among --gpus {n_ranks}; "
            f"use --data.batch-size {near}, or --gpus {alternatives(divisors(batch))}"
        )
    sequences = batch // n_ranks
    most = min(config.data.micro_batch_size or sequences, sequences)
    micro = max(d for d in divisors(sequences) if d <= most)
    return micro, sequences // micro
