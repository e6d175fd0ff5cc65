"""Bytes that one rank of a mesh holds in training: weights, gradients, optimiser state, what the
forward pass keeps for backward, and what parallelism adds.

Not counted: short-lived buffers, CUDA's context, NCCL's buffers and fragmentation; `plan.machine`
leaves some 6 % for them."""

from enum import Enum

from headway.config import Config, OptimConfig
from headway.model.costs import CostGroup
from headway.model.roles import Group
from headway.plan.cost import Item, Items, ModelCosts, Weights
from headway.plan.layout import MeshLayout, ShareKind, stored, used
from headway.plan.traffic import TokenExchange, sub_token


class MemoryPart(Enum):
    """What a rank holds besides tensors saved for backward (`CostGroup`)."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    ADAMW = "AdamW moments"
    MUON = "Muon momentum"
    RECEIVED = "sub-tokens received from the ep axis"
    GATHERED = "weights gathered for use"
    UNEVEN = "rows of the busiest rank"


def memory(
    config: Config,
    costs: ModelCosts,
    layout: MeshLayout,
    micro: int,
    bytes_per_value: int,
    imbalance: float = 1.0,
) -> Items:
    """Return the bytes in groups; `costs` are those of a forward pass over `micro` sequences.
    `layout.shard` divides weights, gradients and optimiser state over the ranks that replicate
    them."""
    saved = costs.saved
    if layout.shard:  # casts are gathered and freed layer by layer
        saved = tuple(item for item in saved if item.part is not CostGroup.CASTS)
    rows = [i.value for i in saved if i.part in (CostGroup.EXPERTS, CostGroup.PERMUTATION)]
    uneven = (imbalance - 1) * sum(rows) if layout.ep > 1 else 0
    items = (
        *states(costs, layout, config.optim),
        *saved,
        _received(config, layout, micro * config.data.seq_len, bytes_per_value),
        _gathered(costs, layout, bytes_per_value),
        Item(MemoryPart.UNEVEN, uneven, "(imbalance − 1)·(experts + sorted rows)"),
    )
    return tuple(item for item in items if item.value)


def states(costs: ModelCosts, layout: MeshLayout, optim: OptimConfig) -> Items:
    """Return weights, gradients and optimiser state of one rank, independent of the batch."""
    counts = [(weights, stored(weights, layout)) for weights in costs.weights]
    n = sum(count for _, count in counts)
    muon = sum(count for weights, count in counts if by_muon(weights, optim))
    moment = 2 if optim.state_dtype == "bfloat16" else 4
    items = (
        Item(MemoryPart.WEIGHTS, 4 * n, "4 bytes per parameter"),
        Item(MemoryPart.GRADIENTS, 4 * n, "4 bytes per parameter"),
        Item(MemoryPart.ADAMW, 2 * moment * (n - muon), f"2·{moment} bytes per parameter"),
        Item(MemoryPart.MUON, 4 * muon, "4 bytes per parameter of the blocks' matrices"),
    )
    return tuple(item for item in items if item.value)


def by_muon(weights: Weights, optim: OptimConfig) -> bool:
    """Return whether Muon updates these parameters; AdamW does otherwise."""
    experts = weights.group in (Group.EXPERT_IN, Group.EXPERT_OUT)
    return optim.name == "muon" and (
        weights.group is Group.MATRIX or (experts and optim.muon_experts)
    )


def _received(config: Config, layout: MeshLayout, n_tokens: int, b: int) -> Item:
    """Return what Expert Parallel received, which it keeps beside what it sent; Head Parallel keeps
    as many sub-tokens as a single process, those of its heads."""
    exchange = layout.exchanges.get("ep")
    if exchange is None:
        return Item(MemoryPart.RECEIVED, 0, "")
    model, sub = config.model, sub_token(config.model, exchange, layout.ep, b)
    if exchange is TokenExchange.PER_SLOT:
        value, formula = sub.row, "K·L·b"
    else:
        value = sub.row + sub.indices + sub.gates
        copies = "ep" if exchange is TokenExchange.ALL_GATHER else "c"
        formula = f"{copies}·(L·b + K·(i+g))"
    value = model.n_sparse * n_tokens * model.moe.n_heads * (sub.copies * value)
    return Item(MemoryPart.RECEIVED, value, f"layers·T·H·{formula}")


def _gathered(costs: ModelCosts, layout: MeshLayout, b: int) -> Item:
    """Return what FSDP gathers: the weights of two layers of this rank (the current one and the
    next) and one layer's full gradients; or the embedding and the head where that is more. Experts,
    embedding and head are sent in b bytes and converted to float32."""
    n = dict.fromkeys(ShareKind, 0.0)
    for share, count in used(costs, layout).items():
        if share.gathers and layout.size(share.axis) > 1:
            n[share.kind] += count
    blocks, experts = n[ShareKind.REPLICATED], n[ShareKind.EXPERTS]
    layers = (3 * b * blocks + 12 * experts) / costs.config.n_layers
    return Item(
        MemoryPart.GATHERED,
        max(layers, 8 * n[ShareKind.EMBEDDING]),
        "max((3·b·n + 12·experts)/layers, 8·(embedding and head))",
    )
