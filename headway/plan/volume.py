"""Bytes that one rank sends in an optimiser step: sub-tokens, gradients and, with FSDP, weights.

Letters as in `plan.traffic`; T is all tokens of the rank in a step. A message goes from one rank to
one other: P−1 in an all-to-all or a ring all-gather, 2·(P−1) in a ring all-reduce. n is the number
of parameters that the rank computes with; passes are its micro-batches.
"""

from dataclasses import dataclass
from typing import Literal

from headway.config import Config, ModelConfig
from headway.plan import traffic as t
from headway.plan.cost import ModelCosts
from headway.plan.layout import AxisName, MeshLayout, Share, ShareKind, used
from headway.plan.shape import Shape, shape_of


@dataclass(frozen=True)
class CommVolume:
    """Bytes of one kind that a rank sends in a step."""

    name: str
    kind: Literal["tokens", "weights", "gradients"]
    axis: AxisName
    bytes: float
    messages: int
    formula: str


def comm_volumes(
    costs: ModelCosts,
    layout: MeshLayout,
    n_tokens: int,
    passes: int,
    bytes_per_value: int,
    *,
    payload: int | None = None,
    chunks: int = 1,
    imbalance: float = 1.0,
) -> list[CommVolume]:
    """Return all that a rank sends in a step, over all sparse layers.

    Args:
        n_tokens: T, of this rank in a step.
        passes: forward passes (micro-batches) of a step.
        bytes_per_value: b, of the matmuls' dtype.
        payload: b of sub-tokens as they are sent; None: the same.
        chunks: parts of a micro-batch for overlap; more messages, the same bytes.
        imbalance: permuted tokens of the most loaded rank of an ep axis over the mean; an
            all-gather does not depend on it.
    """
    s, b = shape_of(costs.config), bytes_per_value
    on_wire, calls = b if payload is None else payload, passes * chunks
    volumes = token_volumes(costs.config, layout, n_tokens, calls, on_wire, imbalance)
    for share, n in used(costs, layout).items():
        if n and layout.size(share.axis) > 1:
            volumes += _parameters(share, n, layout, s, passes, b, chunks)
    return volumes


def token_volumes(
    model: ModelConfig,
    layout: MeshLayout,
    n_tokens: int,
    calls: int,
    payload: int,
    imbalance: float = 1.0,
) -> list[CommVolume]:
    """Return what the sparse layers send, in `calls` forward passes of a layer per step."""
    s = shape_of(model)
    volumes = []
    if layout.hp > 1:
        volumes.append(_heads(model, s, layout, n_tokens, payload, s.n_sparse * calls))
    if layout.ep > 1:
        volumes += _experts(s, layout, n_tokens, payload, s.n_sparse * calls, imbalance)
    return volumes


def ep_totals(
    model: ModelConfig, layout: MeshLayout, n_tokens: int, calls: int, bytes_per_value: int
) -> dict[t.Scheme, float]:
    """Return the bytes on the ep axis under each scheme, per step, with even choices; `calls`
    exchanges of counts per layer. One copy per rank never sends more sub-tokens than an all-gather,
    c ≤ P; but it needs the counts, and the host waits for them."""
    s = shape_of(model)
    totals = {}
    for scheme in t.SCHEMES:
        counts = 0 if scheme == "all_gather" else calls * t.count_bytes(layout.ep)
        exchange = _ep_bytes(s, scheme, layout.ep, n_tokens, bytes_per_value)
        totals[scheme] = s.n_sparse * (exchange.total + counts)
    return totals


def _ep_bytes(s: Shape, scheme: t.Scheme, n_ranks: int, n_tokens: int, b: int) -> t.ExchangeBytes:
    index = t.index_bytes(s.H, s.E)
    return t.expected_bytes(scheme, n_tokens * s.H, s.L, s.K, n_ranks, b, index)


def layer_exchanges(
    model: ModelConfig, layout: MeshLayout, n_tokens: int, b: int
) -> dict[AxisName, t.ExchangeBytes]:
    """Return the four exchanges of one sparse layer on each axis that has any, for T tokens of the
    rank."""
    s = shape_of(model)
    by_axis: dict[AxisName, t.ExchangeBytes] = {}
    if layout.hp > 1:
        token = model.moe.reads_token
        sizes = n_tokens, s.H, s.L, s.K, s.E, layout.hp, b
        by_axis["hp"] = t.head_bytes(*sizes, reads_token=token)
    if layout.scheme is not None and layout.ep > 1:
        by_axis["ep"] = _ep_bytes(s, layout.scheme, layout.ep, n_tokens, b)
    return by_axis


def token_bytes(config: Config, scheme: t.Scheme, bytes_per_value: int) -> float:
    """Return the bytes of sub-tokens and outputs that a rank is expected to send in an optimiser
    step of a run, over all sparse layers."""
    mesh, data = config.mesh, config.data
    layout = MeshLayout(mesh.dp, mesh.hp, mesh.ep, scheme if mesh.ep > 1 else None)
    rows = data.batch_size // layout.ranks
    calls = rows // (data.micro_batch_size or rows) * max(mesh.chunks, 1)
    payload = t.payload_bytes(mesh, bytes_per_value)
    volumes = token_volumes(config.model, layout, rows * data.seq_len, calls, payload)
    return sum(volume.bytes for volume in volumes)


def _heads(
    model: ModelConfig, s: Shape, layout: MeshLayout, n_tokens: int, b: int, calls: int
) -> CommVolume:
    exchange = layer_exchanges(model, layout, n_tokens, b)["hp"]
    extra = " + H·K·(i+2g)" if model.moe.reads_token else ""
    values = "H·(L+4)" if b == 1 else "D_L·b"
    formula = f"layers·T·(4·{values}{extra})·(hp−1)/hp"
    messages = 4 * calls * (layout.hp - 1)
    return CommVolume(
        "Head Parallel", "tokens", "hp", s.n_sparse * exchange.total, messages, formula
    )


_EXPERTS: dict[t.Scheme, tuple[str, str]] = {
    "all_to_all": (
        "Expert Parallel, one copy per rank",
        "layers·T·H·c·(4·L·b + K·(i+2g))·(ep−1)/ep, c = ep·(1−(1−1/ep)^K)",
    ),
    "all_to_all_per_slot": (
        "Expert Parallel, one copy per slot",
        "layers·T·H·K·(4·L·b + i)·(ep−1)/ep",
    ),
    "all_gather": (
        "Expert Parallel, all-gather",
        "layers·T·H·(4·L·b + K·(i+2g))·(ep−1)",
    ),
}


def _experts(
    s: Shape, layout: MeshLayout, n_tokens: int, b: int, calls: int, imbalance: float
) -> list[CommVolume]:
    assert layout.scheme is not None
    name, formula = _EXPERTS[layout.scheme]
    formula = formula.replace("L·b", "(L+4)") if b == 1 else formula
    value = s.n_sparse * _ep_bytes(s, layout.scheme, layout.ep, n_tokens, b).total
    others = layout.ep - 1
    if layout.scheme == "all_gather":
        return [CommVolume(name, "tokens", "ep", value, 4 * calls * others, formula)]
    if imbalance != 1.0:
        value, formula = value * imbalance, f"imbalance·{formula}"
    counts = calls * t.count_bytes(layout.ep)
    return [
        CommVolume(name, "tokens", "ep", value, 4 * calls * others, formula),
        CommVolume(
            "counts of rows",
            "tokens",
            "ep",
            counts,
            calls * others,
            "layers·passes·chunks·8·(ep−1)",
        ),
    ]


def _parameters(
    share: Share, n: int, layout: MeshLayout, s: Shape, passes: int, b: int, chunks: int
) -> list[CommVolume]:
    """Return what parameters cost: an all-reduce of gradients once per step, or with `shard` an
    all-gather of weights where they are used, in forward and in backward (experts for every chunk
    of tokens; embedding and head once for both), and a reduce-scatter of gradients after each pass.
    Exact where P divides the first dim of each parameter; shards are padded otherwise."""
    axis, P = share.axis, layout.size(share.axis)
    size = {"world": "N", "routers": "(dp·ep)", "dp": "dp"}[axis]
    fraction = f"n·({size}−1)/{size}"
    if not share.gathers:
        name, value = f"gradients all-reduced, {share.kind.value}", t.all_reduce_bytes(n, P)
        return [CommVolume(name, "gradients", axis, value, 2 * (P - 1), f"2·4·{fraction}")]
    groups = {ShareKind.EXPERTS: s.n_sparse, ShareKind.EMBEDDING: 1}.get(share.kind, s.n_layers)
    gathers = share.gathers * (chunks if share.kind is ShareKind.EXPERTS else 1)
    times = "passes·" + (f"{gathers}·" if gathers > 1 else "")
    weights, gradients = passes * t.scatter_bytes(n, P, b), passes * t.scatter_bytes(n, P)
    calls = passes * groups * (P - 1)
    gathered = f"weights gathered, {share.kind.value}"
    name = f"gradients reduce-scattered, {share.kind.value}"
    return [
        CommVolume(
            gathered, "weights", axis, gathers * weights, gathers * calls, f"{times}b·{fraction}"
        ),
        CommVolume(name, "gradients", axis, gradients, calls, f"passes·4·{fraction}"),
    ]
