"""What `headway plan` predicts for the steps of `bench/cluster.py`, on a machine that was measured
beside them; nothing here runs anything.

Three measurements, none of them of a spread step, make the machine:

- `rates` of `headway doctor --measure`, on all hosts at once, since they share the cores;
- `alone`: what one host computes, as a model of one process, on all hosts at once and in the same
  rounds. The rates are scaled so that plan predicts this step rightly: formulas know FLOPs and
  bytes, not how well a kernel of this shape runs;
- `network`: plain collectives at each rate of the links, and without a limit, where nothing but
  the hosts' own cores limits them.

Of a case's own steps one number is used, which is none of time: the rows of the busiest host over
the mean, plan's --imbalance.
"""

import dataclasses
import statistics
from collections.abc import Iterable

from bench.cluster_host import OPTIM, Size, share_of
from bench.cluster_report import BYTES, Case
from headway.config import Config, DataConfig, ModelConfig
from headway.plan.choose import rank_meshes
from headway.plan.link import Curve, parse_curve
from headway.plan.machine import MACHINES, Machine
from headway.plan.setting import Setting

HOSTS = 4


def with_predictions(rows: list[dict], cases: Iterable[Case], size: Size) -> list[dict]:
    """The rows of the sweep with `predicted_ms`, `ratio` (predicted over measured) and the `parts`
    in ms; from rows alone, so that a saved file can be predicted again."""
    by_key = {(c.name, c.k): c for c in cases}
    rates = next(r for r in rows if r["bench"] == "rates")
    alone = {
        (r["name"], r["k"], r["mbit"]): alone_ms(r, rates) for r in rows if r["bench"] == "alone"
    }
    network = {
        r["mbit"]: [parse_curve(c) for c in r["curves"]] for r in rows if r["bench"] == "network"
    }
    predictions = []
    for row in rows:
        if row["bench"] == "sweep":
            case = by_key[row["name"], row["k"]]
            machine = calibrated(rates, network[0.0], network[row["mbit"]] if row["mbit"] else None)
            width = BYTES[rates["dtype"]]
            step = alone[alone_name(case), case.k, row["mbit"]]
            machine = scaled(machine, case.model, size, width, step)
            parts = predicted(machine, case, size, width, row["imbalance"])
            total = sum(parts.values())
            row = row | {"predicted_ms": total, "ratio": total / row["step_ms"], "parts": parts}
        predictions.append(row)
    return predictions


def alone_ms(row: dict, rates: dict) -> float:
    """Return the one-process step of a host while all hosts compute. Their processes share the
    cores, so it lasts at least its processor time × ranks per core; the measured time is shorter
    where some host began late, which it may, since nothing synchronises these steps."""
    return max(row["step_ms"], rates["oversubscription"] * row["cpu_ms"])


def alone_name(case: Case) -> str:
    """Of the one-process model of a case: one for all ways in which a layer travels."""
    return case.model.moe.kind


def calibrated(rates: dict, free: list[Curve], limited: list[Curve] | None) -> Machine:
    """A host: `free` are the collectives on links without a limit, `limited` those at a rate."""
    inside = [dataclasses.replace(c, inside=True) for c in free]
    # a link without a limit is as fast as hosts can move bytes
    between = free if limited is None else limited
    return dataclasses.replace(
        MACHINES["cpu"],
        name="an emulated host",
        dtype=rates["dtype"],
        curves=(*inside, *between),
        oversubscription=rates["oversubscription"],
        **rates["measured"],
    )


def scaled(machine: Machine, model: ModelConfig, size: Size, width: int, ms: float) -> Machine:
    """The machine on which the one-process step of a case takes `ms`."""
    config = _config(share_of(model, HOSTS), size, 1)
    setting = Setting(config, machine, bytes_per_value=width)
    factor = ms / (1000 * rank_meshes(setting, 1)["meshes"][0]["step_seconds"])
    return dataclasses.replace(
        machine,
        peak=machine.peak / factor,
        peak_float32=machine.peak_float32 / factor,
        memory_bandwidth=machine.memory_bandwidth / factor,
    )


def predicted(
    machine: Machine, case: Case, size: Size, width: int, imbalance: float
) -> dict[str, float]:
    """Part → milliseconds: the row of `headway plan` for the case's mesh, one rank per node."""
    mesh = case.mesh
    ranks = mesh.dp * mesh.hp * mesh.ep
    scheme = "all_to_all" if mesh.dedup else "all_to_all_per_slot"
    config = _config(case.model, size, ranks)
    setting = Setting(config, machine, 1, width, mesh.chunks, imbalance)
    wanted = (mesh.dp, mesh.hp, mesh.ep, "replicate")
    row = next(
        r
        for r in rank_meshes(setting, ranks, scheme)["meshes"]
        if (r["dp"], r["hp"], r["ep"], r["replicas"]) == wanted
    )
    return {name: 1000 * seconds for name, seconds in row["seconds"].items()}


def median_curves(turns: list[list[Curve]]) -> list[Curve]:
    """Point by point, over measurements of the same sizes."""
    medians = []
    for same in zip(*turns, strict=True):
        points = zip(*(c.points for c in same), strict=True)
        middle = tuple((p[0][0], statistics.median(t for _, t in p)) for p in points)
        medians.append(dataclasses.replace(same[0], points=middle))
    return medians


def _config(model: ModelConfig, size: Size, ranks: int) -> Config:
    data = DataConfig(seq_len=size.seq_len, batch_size=size.batch * ranks)
    return Config(model=model, data=data, optim=OPTIM)
