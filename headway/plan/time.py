"""Predicted seconds of one optimiser step on the slowest rank: a sum of parts, each one formula.

| part | seconds |
|---|---|
| matmuls | 3·T·FLOPs forward, without experts and attention scores / (peak · efficiency) |
| attention scores | 3·T·FLOPs forward / (peak · attention efficiency) |
| experts | (3 + G/(G+1) with recompute)·T·FLOPs forward · imbalance / (peak · experts efficiency) |
| memory traffic | passes · (2·kept bytes + 3·b·parameters used) / memory bandwidth |
| experts again | passes · (chunks − 1) · (3·b + 12)·experts / memory bandwidth |
| copies | bytes of `plan.layer` / (memory bandwidth · rows efficiency) |
| hp, ep | what `plan.overlap` does not hide |
| weights (FSDP) | max(comm / (2·layers·passes), comm − the parts of compute) |
| gradients | max(comm / (layers + 1), comm − backward of the last pass, or of all with FSDP) |
| small sums | 3 · latency · 2·(N−1) |
| optimiser | (2·weights + gradients + 2·state) bytes / memory bandwidth + Newton–Schulz |

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
processor that moves the bytes itself (gloo) pays for the hidden part as well.
"""

from dataclasses import dataclass

from headway.config import Config
from headway.plan.cost import flops
from headway.plan.layer import axis_link, exchange_costs
from headway.plan.layout import MeshLayout, auto_chunks, used_parameters
from headway.plan.machine import WIDE, Machine
from headway.plan.memory import by_muon
from headway.plan.rank_memory import CAST, GATHERED
from headway.plan.shape import Item, shape_of, total
from headway.plan.volume import CommVolume

COPIED = "layers·passes·bytes / (memory bandwidth·rows_efficiency)"
HIDDEN = "comm − what stages of other chunks hide (plan/overlap.py)"
_NOT_KEPT = ("weights", "gradients", "AdamW moments", "Muon momentum", CAST, GATHERED)


@dataclass(frozen=True)
class Setting:
    """The inputs of a prediction other than the mesh."""

    config: Config
    machine: Machine
    per_node: int = 8
    bytes_per_value: int = 2
    chunks: int = 0
    """0: `layout.auto_chunks` chooses for each mesh."""
    imbalance: float = 1.0

    def chunks_on(self, layout: MeshLayout) -> int:
        """Return the chunks of a micro-batch on a mesh."""
        return self.chunks or auto_chunks(layout, self.per_node)[0]


def step_flops(config: Config, n_tokens: int, imbalance: float = 1.0) -> dict[str, Item]:
    """Return the FLOPs of one rank and step: `matmuls`, `attention scores`, `experts`; the last
    include what `recompute` computes again."""
    s = shape_of(config.model)
    forward = {item.name: item.value for item in flops(config.model, config.data.seq_len)}
    experts, scores = forward.pop("experts", 0), forward.pop("attention scores", 0)
    again = s.G / (s.G + 1) if config.run.recompute else 0
    words = "(3 + G/(G+1))" if again else "3"
    uneven = "·imbalance" if imbalance != 1 else ""
    return {
        "matmuls": Item("matmuls", 3 * n_tokens * sum(forward.values()), "3·T·FLOPs forward"),
        "attention scores": Item("attention scores", 3 * n_tokens * scores, "3·T·FLOPs forward"),
        "experts": Item(
            "experts",
            (3 + again) * n_tokens * experts * imbalance,
            f"{words}·T·FLOPs forward{uneven}",
        ),
    }


def step_seconds(
    setting: Setting,
    layout: MeshLayout,
    n_tokens: int,
    passes: int,
    memory: tuple[Item, ...],
    volumes: tuple[CommVolume, ...],
) -> tuple[Item, ...]:
    """Return the parts of a step. `memory` and `volumes` are the rank's, from `rank_memory.memory`
    and `volume.comm_volumes`."""
    config, machine, b = setting.config, setting.machine, setting.bytes_per_value
    D = config.model.d_model
    share = "efficiency" if D >= WIDE else "narrow_efficiency"
    matmul, experts = machine.rate("matmul", b, D), machine.rate("experts", b, D)
    attention = machine.rate("attention", b, D)
    uneven = machine.uneven(setting.imbalance) if layout.ep > 1 else 1.0
    done = step_flops(config, n_tokens, uneven)
    kept = sum(item.value for item in memory if item.name not in _NOT_KEPT)
    parameters = used_parameters(config.model, layout)
    used, experts_used = total(parameters), sum(p.value for p in parameters if p.name == "experts")
    again = setting.chunks_on(layout) - 1 if layout.hp * layout.ep > 1 else 0
    compute = (
        Item(
            "matmuls",
            done["matmuls"].value / matmul,
            f"{done['matmuls'].formula} / (peak·{share})",
        ),
        Item(
            "attention scores",
            done["attention scores"].value / attention,
            f"{done['attention scores'].formula} / (peak·attention_efficiency)",
        ),
        Item(
            "experts",
            done["experts"].value / experts,
            f"{done['experts'].formula} / (peak·experts_efficiency)",
        ),
        Item(
            "memory traffic",
            passes * (2 * kept + 3 * b * used) / machine.memory_bandwidth,
            "passes·(2·kept bytes + 3·b·parameters used) / memory bandwidth",
        ),
        Item(
            "experts again",
            passes * again * (3 * b + 12) * experts_used / machine.memory_bandwidth,
            "passes·(chunks−1)·(3·b + 12)·experts' parameters / memory bandwidth",
        ),
    )
    exposed = (
        *_exchanges(setting, layout, n_tokens, passes),
        _weights(setting, layout, volumes, passes, total(compute)),
        _gradients(setting, layout, volumes, passes, total(compute)),
        _small_sums(setting, layout),
    )
    items = (*compute, *exposed, *_optimiser(setting, layout, memory))
    return tuple(item for item in items if item.value)


def _comm(setting: Setting, layout: MeshLayout, sent: CommVolume) -> float:
    machine = setting.machine
    inside = layout.in_one_node(sent.axis, setting.per_node)
    bandwidth = machine.intra_node if inside else machine.inter_node
    return sent.bytes / bandwidth + machine.latency * sent.messages


def _weights(
    setting: Setting,
    layout: MeshLayout,
    volumes: tuple[CommVolume, ...],
    passes: int,
    compute: float,
) -> Item:
    comm = sum(_comm(setting, layout, w) for w in volumes if w.kind == "weights")
    pieces = 2 * setting.config.model.n_layers * passes
    formula = "max(comm/(2·layers·passes), comm − compute)"
    return Item("weights gathered, exposed", _exposed(comm, pieces, compute), formula)


def _exchanges(
    setting: Setting, layout: MeshLayout, n_tokens: int, passes: int
) -> tuple[Item, Item, Item]:
    """Return the copies around the exchanges of the sparse layers, and the exposed time of the
    exchanges on hp and ep."""
    names = "copies around exchanges", "Head Parallel, exposed", "Expert Parallel, exposed"
    formulas = COPIED, HIDDEN, HIDDEN
    layers = shape_of(setting.config.model).n_sparse * passes
    costs = (0.0, 0.0, 0.0)
    if layout.hp * layout.ep > 1:
        costs = exchange_costs(
            setting.config,
            setting.machine,
            layout,
            n_tokens // passes,
            setting.chunks_on(layout),
            per_node=setting.per_node,
            bytes_per_value=setting.bytes_per_value,
            imbalance=setting.imbalance if layout.ep > 1 else 1.0,
        )
    items = zip(names, costs, formulas, strict=True)
    a, b, c = (Item(name, layers * value, formula) for name, value, formula in items)
    return a, b, c


def _gradients(
    setting: Setting,
    layout: MeshLayout,
    volumes: tuple[CommVolume, ...],
    passes: int,
    compute: float,
) -> Item:
    comm = work = 0.0
    for sent in volumes:
        if sent.kind != "gradients":
            continue
        if layout.shard:
            comm += _comm(setting, layout, sent)
        else:
            link = axis_link(setting.machine, layout, sent.axis, setting.per_node)
            comm += link.ring(sent.bytes)
            work += link.ring_work(sent.bytes)
    hiding = compute * 2 / 3 / (1 if layout.shard else passes)
    exposed = _exposed(comm, setting.config.model.n_layers + 1, hiding)
    formula = "max(comm/(layers+1), comm − backward" + (
        ")" if layout.shard else " of the last pass)"
    )
    if work:  # the hidden part still takes its share of the processor
        exposed += work * (comm - exposed) / comm
        formula += " + the processor's part of the rest"
    return Item("gradients summed", exposed, formula)


def _small_sums(setting: Setting, layout: MeshLayout) -> Item:
    """Return the sums of targets, norm and statistics of `train/step.py` and `parallel/reduce.py`,
    once per step."""
    seconds = 0.0
    if layout.ranks > 1:
        seconds = 3 * axis_link(setting.machine, layout, "world", setting.per_node).ring(0)
    return Item("small sums", seconds, "3·latency·2·(N−1)")


def _exposed(comm: float, pieces: int, work: float) -> float:
    """Return the seconds of `comm`, sent in `pieces`, that `work` does not hide."""
    return max(comm / pieces, comm - work) if comm else 0.0


def _optimiser(setting: Setting, layout: MeshLayout, memory: tuple[Item, ...]) -> tuple[Item, Item]:
    held = {item.name: item.value for item in memory}
    moved = (
        2 * held["weights"]
        + held["gradients"]
        + 2 * (held.get("AdamW moments", 0) + held.get("Muon momentum", 0))
    )
    machine = setting.machine
    ortho = newton_schulz(setting.config, layout)
    return (
        Item(
            "optimiser",
            moved / machine.memory_bandwidth,
            "(2·weights + gradients + 2·state) / memory bandwidth",
        ),
        Item(
            "Newton–Schulz",
            ortho / machine.rate("matmul", setting.bytes_per_value, setting.config.model.d_model),
            "Σ over Muon's matrices 5·(4·m²·n + 2·m³) / rate of matmuls",
        ),
    )


def newton_schulz(config: Config, layout: MeshLayout) -> float:
    """Return the FLOPs of Muon's orthogonalisation on one rank and step: five steps of three
    matmuls per m × n matrix, m ≤ n. Every rank orthogonalises the matrices that it holds; with
    `shard` the ranks divide up those that they would replicate."""
    s, model = shape_of(config.model), config.model
    attention = [(s.D, s.N * s.d)] * 2 + [(s.D, s.M * s.d)] * 2
    if model.attn_gate:
        attention.append((s.D, s.N))
    stacks = (
        ("attention", s.n_layers, attention),
        ("dense networks", s.n_dense, [(s.G_dense * s.F_dense, s.D), (s.D, s.F_dense)]),
        ("latent projections", s.n_sparse * s.projected, [(s.D, s.D_L)] * 2),
        ("shared experts", s.n_sparse, [(s.G * s.F_shared, s.D), (s.D, s.F_shared)]),
        ("experts", s.n_sparse * s.H * s.E, [(s.F, s.L)] * (s.G + 1)),
    )
    flops = 0.0
    for name, count, matrices in stacks:
        if not count or not by_muon(name, config.optim):
            continue
        split = layout.hp * layout.ep if name == "experts" else 1
        if layout.shard:
            split = layout.ranks
        for m, n in (sorted(shape) for shape in matrices):
            flops += count / split * 5 * (4 * m * m * n + 2 * m**3)
    return flops
