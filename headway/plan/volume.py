"""Bytes that one rank sends in an optimiser step: sub-tokens, gradients and, with FSDP, weights.

Letters as in `plan.traffic`; T is all tokens of the rank in a step. A message goes from one rank to
one other: P−1 in an all-to-all or a ring all-gather, 2·(P−1) in a ring all-reduce. n is the number
of parameters that the rank computes with; passes are its micro-batches."""

from dataclasses import dataclass
from typing import Literal

from headway.config import Config, ModelConfig
from headway.plan import traffic as t
from headway.plan.cost import ModelCosts
from headway.plan.layout import AxisName, MeshLayout, Share, ShareKind, used
from headway.plan.setting import Setting


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
    setting: Setting, costs: ModelCosts, layout: MeshLayout, n_tokens: int, passes: int
) -> list[CommVolume]:
    """Return all that a rank sends in a step of T tokens and `passes` forward passes
    (micro-batches), over all sparse layers. Chunks add messages, and bytes of counts and gathered
    experts; an all-gather of tokens does not depend on the imbalance."""
    calls, imbalance = passes * setting.chunks_on(layout), setting.imbalance_on(layout)
    model = setting.config.model
    volumes = token_volumes(model, layout, n_tokens, calls, setting.payload, imbalance)
    for share, n in used(costs, layout).items():
        if n and layout.size(share.axis) > 1:
            volumes += _parameters(setting, layout, share, n, passes)
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
    volumes = []
    for axis, exchange in layout.exchanges.items():
        P, name = layout.size(axis), exchange.value
        value = model.n_sparse * t.expected_bytes(model, exchange, n_tokens, P, payload).total
        formula = f"layers·T·{t.formula(model, exchange, axis, payload)}"
        if exchange.follows_router and imbalance != 1.0:
            value, formula = value * imbalance, f"imbalance·{formula}"
        if exchange is t.TokenExchange.PER_SLOT:
            name += ", one copy per slot"
        messages = model.n_sparse * calls * (P - 1)
        volumes.append(CommVolume(name, "tokens", axis, value, 4 * messages, formula))
        if exchange.follows_router:
            counts = model.n_sparse * calls * t.count_bytes(P)
            formula = "layers·passes·chunks·8·(ep−1)"
            volumes.append(CommVolume("counts of rows", "tokens", axis, counts, messages, formula))
    return volumes


def ep_totals(
    model: ModelConfig, layout: MeshLayout, n_tokens: int, calls: int, bytes_per_value: int
) -> dict[t.Scheme, float]:
    """Return the bytes on the ep axis under each scheme, per step, with even choices; `calls`
    exchanges of counts per layer. One copy per rank never sends more sub-tokens than an all-gather,
    c ≤ P; but it needs the counts, and the host waits for them."""
    totals = {}
    for scheme in t.SCHEMES:
        on_ep = MeshLayout(ep=layout.ep, scheme=scheme)
        volumes = token_volumes(model, on_ep, n_tokens, calls, bytes_per_value)
        totals[scheme] = sum(volume.bytes for volume in volumes)
    return totals


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


def _parameters(
    setting: Setting, layout: MeshLayout, share: Share, n: int, passes: int
) -> list[CommVolume]:
    """Return what parameters cost: an all-reduce of gradients once per step, or with `shard` an
    all-gather of weights where they are used, in forward and in backward (experts for every chunk
    of tokens; embedding and head once for both), and a reduce-scatter of gradients after each pass.
    Exact where P divides the first dim of each parameter; shards are padded otherwise."""
    axis, P, what = share.axis, layout.size(share.axis), share.kind.value
    size = {"world": "N", "routers": "(dp·ep)", "dp": "dp"}[axis]
    fraction = f"n·({size}−1)/{size}"

    def volume(
        name: str, kind: Literal["weights", "gradients"], n_bytes: float, calls: int, formula: str
    ) -> CommVolume:
        formula = f"{formula}·{fraction}"
        return CommVolume(f"{name}, {what}", kind, axis, n_bytes, calls * (P - 1), formula)

    if not share.gathers:
        n_bytes = t.all_reduce_bytes(n, P)
        return [volume("gradients all-reduced", "gradients", n_bytes, 2, "2·4")]
    model, b = setting.config.model, setting.bytes_per_value
    groups, gathers = model.n_layers, share.gathers
    if share.kind is ShareKind.EXPERTS:
        groups, gathers = model.n_sparse, gathers * setting.chunks_on(layout)
    elif share.kind is ShareKind.EMBEDDING:
        groups = 1
    times = "passes·" + (f"{gathers}·" if gathers > 1 else "")
    weights, gradients = passes * t.scatter_bytes(n, P, b), passes * t.scatter_bytes(n, P)
    calls = passes * groups
    return [
        volume("weights gathered", "weights", gathers * weights, gathers * calls, f"{times}b"),
        volume("gradients reduce-scattered", "gradients", gradients, calls, "passes·4"),
    ]
