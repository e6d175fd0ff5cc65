"""Seconds of the stages and exchanges of one sparse layer on a mesh, for `plan.overlap`.

Tokens are copied around an exchange: permuted into the order of the ranks, packed with their
indices and gates, unpacked, summed. `_copies` counts what `parallel/head.py`, `parallel/expert.py`
and `parallel/collectives.py` read and write, in bytes per value of b bytes; local tokens are copied
too. In backward, what precedes an exchange in forward follows the gradient's exchange, and the
other way round. Sums are in float32."""

from dataclasses import replace
from typing import NamedTuple

from headway.model.costs import CostGroup
from headway.plan import traffic as t
from headway.plan.cost import ModelCosts
from headway.plan.layout import AxisName, MeshLayout
from headway.plan.overlap import NOTHING, Kind, Layer, LayerExchange, Message, Work, exposed
from headway.plan.setting import Setting
from headway.plan.traffic import TokenExchange

_KINDS: dict[AxisName, tuple[Kind, Kind]] = {
    "hp": ("scatter", "gather"),
    "ep": ("dispatch", "combine"),
}


class ExchangeCosts(NamedTuple):
    """Seconds of one sparse layer and pass beyond the work of a single process."""

    copies: float
    exposed: dict[AxisName, float]
    """Communication that nothing hides."""
    hidden: dict[AxisName, float]
    """Communication behind which the rank computes."""


def exchange_costs(
    setting: Setting, costs: ModelCosts, layout: MeshLayout, n_tokens: int
) -> ExchangeCosts:
    """Return what the exchanges of one sparse layer cost in a pass over T tokens of this rank."""
    exchanges: dict[Kind, LayerExchange] = {}
    for axis, how in layout.exchanges.items():
        exchanges |= _exchanges(setting, layout, n_tokens, axis, how)
    if not exchanges:
        return ExchangeCosts(0.0, {}, {})
    layer = replace(stages(setting, costs, layout, n_tokens), exchanges=exchanges)
    chunks = setting.chunks_on(layout)
    waits, hidden = exposed(layer, chunks), {}
    for axis in layout.exchanges:
        of_axis = {kind: e for kind, e in exchanges.items() if e.forward.axis == axis}
        back = sum(e.backward.seconds for kind, e in of_axis.items() if kind != "counts")
        sent = chunks * (back + sum(e.forward.seconds for e in of_axis.values()))
        hidden[axis] = max(sent - waits[axis], 0.0)
    before, after = ([e.before for e in exchanges.values()], [e.after for e in exchanges.values()])
    copies = sum(work.forward + work.backward for work in (*before, *after))
    return ExchangeCosts(copies, waits, hidden)


def stages(setting: Setting, costs: ModelCosts, layout: MeshLayout, n_tokens: int) -> Layer:
    """Return the seconds of the layer's stages, each at the rate of its matmuls, without exchanges;
    backward is twice forward, and more with `recompute`."""
    config, machine, b = setting.config, setting.machine, setting.bytes_per_value
    model, G = config.model, config.model.moe.n_inputs
    matmul, experts_rate = (machine.rate(kind, b, model.d_model) for kind in ("matmul", "experts"))

    def work(group: CostGroup, share: float = 1.0) -> Work:
        seconds = share * n_tokens * costs.flops_of(group) / model.n_sparse / matmul
        return Work(seconds, 2 * seconds)

    uneven = machine.uneven(setting.imbalance_on(layout))
    experts = uneven * n_tokens * costs.flops_of(CostGroup.EXPERTS) / model.n_sparse / experts_rate
    again = G / (G + 1) if config.run.recompute else 0
    return Layer(
        split=work(CostGroup.LATENT, 0.5),
        router=work(CostGroup.ROUTERS),
        shared=work(CostGroup.SHARED),
        experts=Work(experts, (2 + again) * experts),
        merge=work(CostGroup.LATENT, 0.5),
        early_route=model.moe.reads_token,
        exchanges={},
    )


def _exchanges(
    setting: Setting, layout: MeshLayout, n_tokens: int, axis: AxisName, how: TokenExchange
) -> dict[Kind, LayerExchange]:
    """Return the exchanges of a layer on one axis: messages of one chunk, copies of all chunks."""
    model, chunks = setting.config.model, setting.chunks_on(layout)
    link = setting.link(layout, axis)
    sent = t.expected_bytes(model, how, n_tokens, link.ranks, setting.payload)
    imbalance = setting.imbalance if how.follows_router else 1.0

    def message(n_bytes: float) -> Message:
        """Between steps of a computation an exchange takes at least the processor's time, even
        where nothing overlaps it."""
        n_bytes /= chunks
        busiest, work = n_bytes * imbalance, link.work(n_bytes)
        seconds = max(link.exchange(n_bytes, busiest), work)
        return Message(axis, seconds, link.concurrent_speed(n_bytes, busiest), work / seconds)

    exchanges: dict[Kind, LayerExchange] = {}
    if how.follows_router:
        counts = Message(axis, link.exchange(t.count_bytes(link.ranks)))
        exchanges["counts"] = LayerExchange(counts, counts)
    out, back = _KINDS[axis]
    before, after, after_back = _copies(setting, how, n_tokens, link.ranks)
    there, home = message(sent.dispatch), message(sent.dispatch_backward)
    exchanges[out] = LayerExchange(there, home, before, after)
    there, home = message(sent.combine), message(sent.combine_backward)
    exchanges[back] = LayerExchange(there, home, NOTHING, after_back)
    return exchanges


def _copies(
    setting: Setting, how: TokenExchange, n_tokens: int, n_ranks: int
) -> tuple[Work, Work, Work]:
    """Return the copies before and after scatter or dispatch, and after gather or combine, which
    nothing precedes: bytes over the bandwidth of permuted tokens. An all-gather counts the received
    tokens, but for its 2b before, which are a rank's local ones."""
    model, machine, b = setting.config.model, setting.machine, setting.bytes_per_value
    values = n_tokens * model.moe.latent_width(model.d_model)
    speed = machine.memory_bandwidth * machine.rows_efficiency
    rate = speed / (values * t.sub_token(model, how, n_ranks, b).copies)

    def copy(forward: int, backward: int) -> Work:
        return Work(forward / rate, backward / rate)

    match how:
        case TokenExchange.HEADS:
            route = 2 * b if model.moe.reads_token else 0  # of a token router
            before = copy(2 * b + route, 2 * b + route)
            return before, copy(route, route), copy(2 * b, 2 * b)
        case TokenExchange.PER_RANK:
            return copy(4 * b, 3 * b + 16), copy(2 * b, 2 * b), copy(b + 16, 2 * b)
        case TokenExchange.PER_SLOT:
            return copy(5 * b, 6 * b), copy(2 * b, 0), copy(5 * b + 16, 7 * b + 28)
        case TokenExchange.ALL_GATHER:
            return Work(2 * b * values / speed, 0.0), copy(2 * b, b + 4), copy(b + 4, 0)
