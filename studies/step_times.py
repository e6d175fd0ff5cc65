"""How long is a step of Multi-Head LatentMoE, beside a flat mixture of its FLOPs and parameters?

At width 4,096 steps are predicted by `headway plan`, on the fastest mesh and micro-batch: nothing
was run, no cluster was there. The plan assumes that experts' matmuls reach less of a GPU than
others; since that favours designs with other matmuls, all is predicted again with one efficiency
for both. At width 128 steps are measured on this machine, one thread, in turns."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from headway.config import Config, with_leaf
from headway.lab.calibrate import calibrate
from headway.lab.experiment import Arm
from headway.lab.match import Quantity, match, measure
from headway.lab.measurement import Measurement, Row, Verdict
from headway.plan.choose import rank_meshes
from headway.plan.machine import Machine, machine_named, with_network
from headway.plan.setting import Setting
from studies.arms import flat, heads, series, slices

CORPUS, FLAT = "python", "flat"
WIDTH, LAYERS, VOCABULARY, WINDOW, BATCH = 4096, 32, 131_072, 4096, 256
CLUSTERS = {
    "8 H100": (8, "400"),
    "4 × 8 H100, 400 Gb/s": (32, "400"),
    "4 × 8 H100, 100 Gb/s": (32, "100"),
}
"""Name → GPUs, eight of a node, and Gb/s between nodes, per GPU."""
MICRO = (1, 2, 4, 8)
"""Sequences of a forward pass that are tried."""
CPU = "1 CPU core"


def wide(arm: Arm) -> Config:
    """Return an arm at the width of the clusters, with its ratios."""
    fields = {
        "model.d_model": WIDTH,
        "model.n_layers": LAYERS,
        "model.n_heads": 32,
        "model.n_kv_heads": 8,
        "model.vocab_size": VOCABULARY,
        "model.moe.d_expert": 3 * WIDTH // 8,
        "data.seq_len": WINDOW,
        "data.batch_size": BATCH,
        "run.recompute": True,
    }
    config = arm.config
    for name, value in fields.items():
        config = with_leaf(config, name, value)
    return config


def designs() -> dict[str, Config]:
    """Return flat, and heads with and without projections of its FLOPs and parameters within 1%."""
    base = wide(flat(CORPUS))
    budgets: tuple[Quantity, ...] = ("active-flops", "total-parameters")
    targets: dict[Quantity, float] = {quantity: measure(base, quantity) for quantity in budgets}
    others = [make(CORPUS, n) for n in (2, 8) for make in (heads, slices)]
    names = ["2 heads", "2 slices", "8 heads", "8 slices"]
    return {FLAT: base} | {
        name: match(wide(arm), targets).config for name, arm in zip(names, others, strict=True)
    }


def predicted(config: Config, machine: Machine, gpus: int) -> Row:
    """Return the fastest mesh, micro-batch and step."""
    micro = (with_leaf(config, "data.micro_batch_size", n) for n in MICRO)
    plans = (rank_meshes(Setting(c, machine), gpus) for c in micro)
    best = min(
        ((p["best"], p["micro_batch_size"]) for p in plans if p["best"]),
        key=lambda pair: pair[0]["step_seconds"],
    )
    mesh, size = best
    scheme = f" {mesh['scheme']}" if mesh["scheme"] else ""
    return {
        "mesh": f"{mesh['mesh']}{scheme}, {mesh['replicas']}, micro-batch {size}",
        "ms": 1000 * mesh["step_seconds"],
    }


def predictions() -> Iterator[Row]:
    """Yield the rows of the clusters."""
    configs, h100 = designs(), machine_named("h100")
    for name, (gpus, network) in CLUSTERS.items():
        there = with_network(h100, network)
        for efficiency in (there.experts_efficiency, there.efficiency):
            machine = replace(there, experts_efficiency=efficiency)
            for design, config in configs.items():
                row = predicted(config, machine, gpus)
                yield {"where": name, "experts": efficiency, "design": design, **row}


def measured() -> Iterator[Row]:
    """Yield the rows of this machine, at width 128."""
    arms = (flat(CORPUS), heads(CORPUS, 2, "2 heads"), slices(CORPUS, 2, "2 slices"))
    planned = series("screen", CORPUS, arms, (0,), (250,)).plan(lambda _: None)
    sized = {name: by[250] for name, by in planned.items()}
    seconds = calibrate({name: (arm.config, arm.edit) for name, arm in sized.items()})
    for name, value in seconds.items():
        yield {"where": CPU, "experts": None, "design": name, "mesh": "", "ms": 1000 * value}


def times() -> list[Row]:
    """Return all rows, each with its time over that of flat beside it."""
    rows = [*predictions(), *measured()]
    base = {(r["where"], r["experts"]): r["ms"] for r in rows if r["design"] == FLAT}
    return [{**r, "over flat": r["ms"] / base[r["where"], r["experts"]]} for r in rows]


def judge(rows: Sequence[Row]) -> Verdict:
    ratios = [r["over flat"] for r in rows if r["design"] == "8 heads"]
    answer = "holds" if max(ratios) < 1 else "refuted" if min(ratios) > 1 else "cannot_tell"
    return Verdict(
        answer, "Eight heads over flat: " + ", ".join(f"{ratio:.2f}" for ratio in ratios) + "."
    )


STUDY = Measurement(
    "step_times",
    "By `headway plan`, at width 4,096 a step of the published form with eight heads is shorter "
    "than one of a flat mixture of its FLOPs and parameters: on one node and on four, whatever "
    "efficiency experts have.",
    "Holds if it is on each of three networks with both efficiencies, refuted if on none.",
    times,
    judge,
)
