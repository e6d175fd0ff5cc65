"""Predicted seconds of one optimiser step on the slowest rank: a sum of parts, each one formula
(docs/plan.md has them in a table).

comm = bytes / bandwidth + latency · messages of the axis, or the measured time (`plan.link`). The
bandwidth is that within a node where every group of the axis is in one, else that between nodes,
for all of its bytes.

The efficiency of matmuls is `narrow_efficiency` where D < 1024.

Left out are kernel launches, the data loader, stragglers, congestion and checkpoints: they cost
every mesh the same or are unknown. Memory traffic is a lower bound: what is kept for backward is
written and read once, weights are read once forward and twice backward; every further chunk reads
its layer's experts again and adds to their gradient in float32.
Overlap: `plan.overlap` simulates the stages and exchanges of a sparse layer as the code runs them.
The weights of the next layer are gathered while a layer computes, and gradients are reduced while
earlier layers are still in backward; nothing hides those of the first layer and the embedding. A
network sends one thing at a time, and so a second of a step hides one thing:

    time        compute, and what tokens wait for on the other network (within or between nodes),
                less what compute hides of the tokens on the same one
    forward     1/3 of it, hides half of the weights
    backward    2/3 of it, hides the other half, and gradients in what is left

A processor that moves the bytes itself (gloo) pays for the hidden part as well."""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from headway.config import Config, OptimConfig
from headway.model.costs import CostGroup
from headway.plan.cost import Item, Items, ModelCosts, total
from headway.plan.layer import exchange_costs
from headway.plan.layout import MeshLayout, ShareKind, share_of, used
from headway.plan.machine import WIDE, Kind
from headway.plan.memory import MemoryPart, by_muon
from headway.plan.setting import Setting
from headway.plan.volume import CommVolume

HIDDEN = "comm − what stages of other chunks hide (plan/overlap.py)"
_MOVED: dict[Enum, int] = {
    MemoryPart.WEIGHTS: 2,
    MemoryPart.GRADIENTS: 1,
    MemoryPart.ADAMW: 2,
    MemoryPart.MUON: 2,
}
"""How often the optimiser reads or writes what a rank holds."""


class TimePart(Enum):
    """A part of a step."""

    MATMULS = "matmuls"
    SCORES = "attention scores"
    EXPERTS = "experts"
    MEMORY = "memory traffic"
    EXPERTS_AGAIN = "experts again"
    COPIES = "copies around exchanges"
    HEAD_PARALLEL = "Head Parallel, exposed"
    EXPERT_PARALLEL = "Expert Parallel, exposed"
    WEIGHTS = "weights gathered, exposed"
    GRADIENTS = "gradients summed"
    SMALL_SUMS = "small sums"
    OPTIMISER = "optimiser"
    NEWTON_SCHULZ = "Newton–Schulz"


class StepFlops(NamedTuple):
    """FLOPs of one rank and step."""

    matmuls: Item
    scores: Item
    experts: Item
    """With what `recompute` computes again."""


def step_flops(
    config: Config, costs: ModelCosts, n_tokens: int, imbalance: float = 1.0
) -> StepFlops:
    """Return the FLOPs of one rank and step."""
    G, recompute = config.model.moe.n_inputs, config.run.recompute
    experts, scores = CostGroup.EXPERTS, CostGroup.SCORES
    matmuls = sum(i.value for i in costs.flops if i.part not in (experts, scores))
    times = 3 + (G / (G + 1) if recompute else 0)
    formula = f"{'(3 + G/(G+1))' if recompute else '3'}·T·FLOPs forward"
    formula += "·imbalance" if imbalance != 1 else ""
    uneven = times * n_tokens * costs.flops_of(experts) * imbalance
    return StepFlops(
        Item(TimePart.MATMULS, 3 * n_tokens * matmuls, "3·T·FLOPs forward"),
        Item(TimePart.SCORES, 3 * n_tokens * costs.flops_of(scores), "3·T·FLOPs forward"),
        Item(TimePart.EXPERTS, uneven, formula),
    )


def step_seconds(
    setting: Setting,
    costs: ModelCosts,
    layout: MeshLayout,
    n_tokens: int,
    passes: int,
    memory: Items,
    volumes: Sequence[CommVolume],
) -> Items:
    """Return the parts of a step. `memory` and `volumes` are the rank's, from `memory.memory` and
    `volume.comm_volumes`."""
    config, machine, b = setting.config, setting.machine, setting.bytes_per_value
    D = config.model.d_model
    work = step_flops(config, costs, n_tokens, machine.uneven(setting.imbalance_on(layout)))
    not_saved = (*_MOVED, MemoryPart.GATHERED, CostGroup.CASTS)
    saved = sum(item.value for item in memory if item.part not in not_saved)
    parameters = used(costs, layout)
    experts = sum(n for s, n in parameters.items() if s.kind is ShareKind.EXPERTS)
    again = setting.chunks_on(layout) - 1 if layout.exchanges else 0

    def computed(item: Item, kind: Kind, efficiency: str) -> Item:
        seconds = item.value / machine.rate(kind, b, D)
        return Item(item.part, seconds, f"{item.formula} / (peak·{efficiency})")

    def moved(part: TimePart, n_bytes: float, formula: str) -> Item:
        return Item(part, n_bytes / machine.memory_bandwidth, f"{formula} / memory bandwidth")

    compute = (
        computed(work.matmuls, "matmul", "efficiency" if D >= WIDE else "narrow_efficiency"),
        computed(work.scores, "attention", "attention_efficiency"),
        computed(work.experts, "experts", "experts_efficiency"),
        moved(
            TimePart.MEMORY,
            passes * (2 * saved + 3 * b * sum(parameters.values())),
            "passes·(2·kept bytes + 3·b·parameters used)",
        ),
        moved(
            TimePart.EXPERTS_AGAIN,
            passes * again * (3 * b + 12) * experts,
            "passes·(chunks−1)·(3·b + 12)·experts' parameters",
        ),
    )
    optimiser = (
        moved(
            TimePart.OPTIMISER,
            sum(_MOVED[i.part] * i.value for i in memory if i.part in _MOVED),
            "(2·weights + gradients + 2·state)",
        ),
        Item(
            TimePart.NEWTON_SCHULZ,
            newton_schulz(costs, config.optim, layout) / machine.rate("matmul", b, D),
            "Σ over Muon's matrices 5·(4·m²·n + 2·m³) / rate of matmuls",
        ),
    )
    layers = config.model.n_sparse * passes
    waited = exchange_costs(setting, costs, layout, n_tokens // passes)
    gathered = sum(_comm(setting, layout, w) for w in volumes if w.kind == "weights")
    small_sum = setting.link(layout, "world").ring(0) if layout.ranks > 1 else 0.0
    copied = "layers·passes·bytes / (memory bandwidth·rows_efficiency)"
    half, pieces = gathered / 2, 2 * config.model.n_layers * passes
    same = setting.link(layout, "world").inside
    free = total(compute)
    for axis, seconds in waited.exposed.items():
        if setting.link(layout, axis).inside == same:
            free -= layers * waited.hidden[axis]
        else:
            free += layers * seconds
    forward, backward = max(free, 0.0) / 3, max(free, 0.0) * 2 / 3
    late = max(half - forward, 0.0) + max(half - backward, 0.0)
    exposed = (
        Item(TimePart.COPIES, layers * waited.copies, copied),
        Item(TimePart.HEAD_PARALLEL, layers * waited.exposed.get("hp", 0.0), HIDDEN),
        Item(TimePart.EXPERT_PARALLEL, layers * waited.exposed.get("ep", 0.0), HIDDEN),
        Item(
            TimePart.WEIGHTS,
            max(gathered / pieces, late),
            "max(comm/(2·layers·passes), (comm/2 − forward) + (comm/2 − backward))",
        ),
        _gradients(setting, layout, volumes, passes, max(backward - half, 0.0)),
        # targets, norm and statistics of train/step.py and parallel/reduce.py, once per step
        Item(TimePart.SMALL_SUMS, 3 * small_sum, "3·latency·2·(N−1)"),
    )
    return tuple(item for item in (*compute, *exposed, *optimiser) if item.value)


def _comm(setting: Setting, layout: MeshLayout, sent: CommVolume) -> float:
    rates = setting.link(layout, sent.axis).rates
    return sent.bytes / rates.bandwidth + rates.latency * sent.messages


def _gradients(
    setting: Setting, layout: MeshLayout, volumes: Sequence[CommVolume], passes: int, free: float
) -> Item:
    """Return what gradients cost beyond `free`, the seconds of backward in which no weights are
    gathered."""
    comm = work = 0.0
    for sent in (volume for volume in volumes if volume.kind == "gradients"):
        if layout.shard:
            comm += _comm(setting, layout, sent)
        else:
            link = setting.link(layout, sent.axis)
            comm += link.ring(sent.bytes)
            work += link.ring_work(sent.bytes)
    hiding = free / (1 if layout.shard else passes)
    exposed = max(comm / (setting.config.model.n_layers + 1), comm - hiding)
    hides = "(backward − weights gathered in it)" if layout.shard else "backward of the last pass"
    formula = f"max(comm/(layers+1), comm − {hides})"
    if work:  # the hidden part still takes its share of the processor
        exposed += work * (comm - exposed) / comm
        formula += " + the processor's part of the rest"
    return Item(TimePart.GRADIENTS, exposed, formula)


def newton_schulz(costs: ModelCosts, optim: OptimConfig, layout: MeshLayout) -> float:
    """Return the FLOPs of Muon's orthogonalisation on one rank and step: five steps of three
    matmuls per m × n matrix, m ≤ n. Every rank orthogonalises the matrices that it holds; with
    `shard` the ranks divide up those that they would replicate."""
    flops = 0.0
    for weights in costs.weights:
        if by_muon(weights, optim):
            split = layout.ranks if layout.shard else share_of(weights, layout).parts
            for (m, n), count in weights.matrices.items():
                flops += count / split * 5 * (4 * m * m * n + 2 * m**3)
    return flops
