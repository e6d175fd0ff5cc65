"""Bytes that one rank of a mesh holds: `plan.memory` for its shards, and what parallelism adds.

On one rank this is `memory.states` and `memory.activations`. Not counted: short-lived buffers,
CUDA's context, NCCL's buffers and fragmentation; `plan.machine` leaves some 6 % for them.
"""

from headway.config import Config
from headway.plan.layout import MeshLayout, held_parameters, shares, used_parameters
from headway.plan.memory import activations, states_of
from headway.plan.shape import Item, shape_of
from headway.plan.traffic import expected_ranks, gate_bytes, index_bytes

CAST = "weights cast to the matmul's dtype"
GATHERED = "weights gathered for use"


def memory(
    config: Config,
    layout: MeshLayout,
    micro: int,
    bytes_per_value: int,
    imbalance: float = 1.0,
) -> tuple[Item, ...]:
    """Return the bytes in groups; `micro` sequences per forward pass of the rank. `layout.shard`
    divides weights, gradients and optimiser state over the ranks that replicate them."""
    activation_items = activations(
        config.model,
        micro,
        config.data.seq_len,
        bytes_per_value=bytes_per_value,
        recompute=config.run.recompute,
        doc_mask=config.data.doc_mask,
    )
    if layout.shard:  # casts are gathered and freed layer by layer
        activation_items = tuple(item for item in activation_items if item.name != CAST)
    items = (
        *states_of(held_parameters(config.model, layout), config.optim),
        *activation_items,
        _received(config, layout, micro * config.data.seq_len, bytes_per_value),
        _gathered(config, layout, bytes_per_value),
        _uneven(activation_items, layout, imbalance),
    )
    return tuple(item for item in items if item.value)


def _received(config: Config, layout: MeshLayout, n_tokens: int, b: int) -> Item:
    """Return what Expert Parallel received, which it keeps beside what it sent; Head Parallel keeps
    as many sub-tokens as a single process, those of its heads."""
    s = shape_of(config.model)
    name, n = "sub-tokens received from the ep axis", n_tokens * s.H
    if layout.ep == 1:
        return Item(name, 0, "")
    slots = s.K * (index_bytes(s.H, s.E) + gate_bytes(b))
    if layout.scheme == "all_gather":
        value, formula = layout.ep * (s.L * b + slots), "layers·T·H·ep·(L·b + K·(i+g))"
    elif layout.scheme == "all_to_all":
        value = expected_ranks(s.K, layout.ep) * (s.L * b + slots)
        formula = "layers·T·H·c·(L·b + K·(i+g))"
    else:
        value, formula = s.K * s.L * b, "layers·T·H·K·L·b"
    return Item(name, s.n_sparse * n * value, formula)


def _gathered(config: Config, layout: MeshLayout, b: int) -> Item:
    """Return what FSDP gathers: the weights of two layers of this rank (the current one and the
    next) and one layer's full gradients; or the embedding and the head where that is more. Experts,
    embedding and head are sent in b bytes and converted to float32."""
    by_name = shares(config.model, layout)
    gathered = {"replicated": 0.0, "experts": 0.0, "embedding and head": 0.0}
    for item in used_parameters(config.model, layout):
        share = by_name[item.name]
        if share.gathers and layout.size(share.axis) > 1:
            gathered[share.name] += item.value
    blocks, experts, ends = gathered.values()
    layers = (3 * b * blocks + 12 * experts) / config.model.n_layers
    return Item(
        GATHERED, max(layers, 8 * ends), "max((3·b·n + 12·experts)/layers, 8·(embedding and head))"
    )


def _uneven(activation_items: tuple[Item, ...], layout: MeshLayout, imbalance: float) -> Item:
    rows = sum(item.value for item in activation_items if item.name in ("experts", "sorted rows"))
    more = (imbalance - 1) * rows if layout.ep > 1 else 0
    return Item("rows of the busiest rank", more, "(imbalance − 1)·(experts + sorted rows)")
