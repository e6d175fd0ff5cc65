"""Seconds of the stages and exchanges of one sparse layer on a mesh, for `plan.overlap`.

Tokens are copied around an exchange: permuted into the order of the ranks, packed with their
indices and gates, unpacked, summed. The table counts `parallel/head.py`, `parallel/expert.py` and
`parallel/collectives.py` in bytes read and written per value of b bytes; local tokens are copied
too.

| exchange | before it: forward, backward | after it: forward, backward |
|---|---|---|
| scatter (with a token router's route) | 2b (4b), 2b (4b) | 0 (2b), 0 (2b) |
| gather | 0, 0 | 2b, 2b |
| dispatch, one copy per rank | 4b, 3b + 16 | 2b, 2b |
| combine, one copy per rank | 0, 0 | b + 16, 2b |
| dispatch, one copy per slot | 5b, 6b | 2b, 0 |
| combine, one copy per slot | 0, 0 | 5b + 16, 7b + 28 |
| dispatch, all-gather | 2b, 0 | 2b, b + 4 |
| combine, all-gather | 0, 0 | b + 4, 0 |

In backward, what precedes an exchange in forward follows the gradient's exchange, and the other
way round. Sums are in float32. An all-gather counts the received tokens, but for its 2b before,
which are a rank's local ones.
"""

from typing import NamedTuple

from headway.config import Config
from headway.model.costs import CostGroup
from headway.plan import traffic as t
from headway.plan.cost import ModelCosts
from headway.plan.layout import AxisName, MeshLayout
from headway.plan.link import Link, Rates
from headway.plan.machine import Machine
from headway.plan.overlap import Kind, Layer, Message, Work, exposed, program
from headway.plan.shape import shape_of

_KINDS: dict[AxisName, tuple[Kind, Kind]] = {
    "hp": ("scatter", "gather"),
    "ep": ("dispatch", "combine"),
}


class ExchangeCosts(NamedTuple):
    """Seconds of one sparse layer and pass beyond the work of a single process."""

    copies: float
    hp: float
    """Exposed communication on the hp axis."""
    ep: float
    """Exposed communication on the ep axis."""


def axis_link(machine: Machine, layout: MeshLayout, axis: AxisName, per_node: int) -> Link:
    """Return how the ranks of an axis are connected."""
    inside = layout.in_one_node(axis, per_node)
    within = Rates(machine.intra_node, machine.latency)
    between = Rates(machine.inter_node, machine.latency)
    return Link(
        layout.size(axis),
        inside,
        within if inside else between,
        within,
        machine.curves,
        machine.cpu_driven,
    )


def exchange_costs(
    config: Config,
    costs: ModelCosts,
    machine: Machine,
    layout: MeshLayout,
    n_tokens: int,
    chunks: int,
    *,
    per_node: int,
    bytes_per_value: int,
    imbalance: float,
) -> ExchangeCosts:
    """Return what the exchanges of one sparse layer cost in a pass.

    Args:
        n_tokens: T, of this rank in a pass.
        imbalance: permuted tokens of the most loaded rank of an ep axis over the mean.
    """
    copied = _copies(config, machine, layout, n_tokens, bytes_per_value)
    layer = stages(config, costs, machine, layout, n_tokens, bytes_per_value, imbalance, copied)
    forward: dict[Kind, Message] = {}
    backward: dict[Kind, Message] = {}
    on_wire = t.payload_bytes(config.mesh, bytes_per_value)
    for axis, exchange in layout.exchanges.items():
        out, back = _KINDS[axis]
        link = axis_link(machine, layout, axis, per_node)
        sent = t.expected_bytes(config.model, exchange, n_tokens, link.ranks, on_wire)
        uneven = imbalance if exchange.follows_router else 1.0
        forward[out] = _message(axis, link, sent.dispatch / chunks, uneven)
        forward[back] = _message(axis, link, sent.combine / chunks, uneven)
        backward[back] = _message(axis, link, sent.combine_backward / chunks, uneven)
        backward[out] = _message(axis, link, sent.dispatch_backward / chunks, uneven)
    counted = layout.ep > 1 and layout.scheme != "all_gather"
    counts = Message("ep", 0.0)
    if counted:
        link = axis_link(machine, layout, "ep", per_node)
        counts = Message("ep", link.exchange(t.count_bytes(layout.ep)))
    waits = exposed(program(layer, chunks, counted), forward, backward, counts)
    extra = sum(w.forward + w.backward for w in (*copied[0].values(), *copied[1].values()))
    return ExchangeCosts(extra, waits.get("hp", 0.0), waits.get("ep", 0.0))


def stages(
    config: Config,
    costs: ModelCosts,
    machine: Machine,
    layout: MeshLayout,
    n_tokens: int,
    b: int,
    imbalance: float,
    copied: tuple[dict[Kind, Work], dict[Kind, Work]] = ({}, {}),
) -> Layer:
    """Return the seconds of the layer's stages, each at the rate of its matmuls; backward is twice
    forward, and more with `recompute`."""
    s = shape_of(config.model)
    matmul = machine.rate("matmul", b, s.D)

    def work(group: CostGroup, share: float = 1.0) -> Work:
        seconds = share * n_tokens * costs.flops_of(group) / s.n_sparse / matmul
        return Work(seconds, 2 * seconds)

    rate = machine.rate("experts", b, s.D)
    uneven = machine.uneven(imbalance) if layout.ep > 1 else 1.0
    experts = uneven * n_tokens * costs.flops_of(CostGroup.EXPERTS) / s.n_sparse / rate
    again = s.G / (s.G + 1) if config.run.recompute else 0
    return Layer(
        split=work(CostGroup.LATENT, 0.5),
        router=work(CostGroup.ROUTERS),
        shared=work(CostGroup.SHARED),
        experts=Work(experts, (2 + again) * experts),
        merge=work(CostGroup.LATENT, 0.5),
        copies_before=copied[0],
        copies_after=copied[1],
        early_route=config.model.moe.reads_token,
    )


def _message(axis: str, link: Link, n_bytes: float, uneven: float) -> Message:
    """Return an exchange of `n_bytes`; between steps of a computation it takes at least the
    processor's time, even where nothing overlaps it."""
    busiest, work = n_bytes * uneven, link.work(n_bytes)
    seconds = max(link.exchange(n_bytes, busiest), work)
    return Message(axis, seconds, link.concurrent_speed(n_bytes, busiest), work / seconds)


def _copies(
    config: Config, machine: Machine, layout: MeshLayout, n_tokens: int, b: int
) -> tuple[dict[Kind, Work], dict[Kind, Work]]:
    """Return the work before and after each exchange: bytes of the table above over the bandwidth
    of permuted tokens."""
    s = shape_of(config.model)
    speed = machine.memory_bandwidth * machine.rows_efficiency
    before: dict[Kind, Work] = {}
    after: dict[Kind, Work] = {}

    def note(kind: Kind, values: float, start: tuple[int, int], end: tuple[int, int]) -> None:
        rate = speed / values
        before[kind], after[kind] = (Work(f / rate, g / rate) for f, g in (start, end))

    values = n_tokens * s.D_L
    if layout.hp > 1:
        packed = 2 * b if config.model.moe.reads_token else 0
        note("scatter", values, (2 * b + packed, 2 * b + packed), (packed, packed))
        note("gather", values, (0, 0), (2 * b, 2 * b))
    if layout.ep > 1 and layout.scheme == "all_to_all":
        rows = values * t.expected_ranks(s.K, layout.ep)
        note("dispatch", rows, (4 * b, 3 * b + 16), (2 * b, 2 * b))
        note("combine", rows, (0, 0), (b + 16, 2 * b))
    elif layout.ep > 1 and layout.scheme == "all_to_all_per_slot":
        note("dispatch", values * s.K, (5 * b, 6 * b), (2 * b, 0))
        note("combine", values * s.K, (0, 0), (5 * b + 16, 7 * b + 28))
    elif layout.ep > 1:
        note("dispatch", values * layout.ep, (0, 0), (2 * b, b + 4))
        before["dispatch"] = Work(2 * b * values / speed, 0.0)
        note("combine", values * layout.ep, (0, 0), (b + 4, 0))
    return before, after
