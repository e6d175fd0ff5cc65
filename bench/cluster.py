"""Training steps on four hosts over slow networks: Head Parallel beside Expert Parallel.

    python bench/cluster.py [--quick] [--rates 500 125] [--repetitions N] [--json] [--save]
    python bench/cluster.py --predict   # the saved rows again with the plan of today; runs nothing

The hosts are network namespaces of this machine on links whose rate `tc` limits in both directions
(`bench/hosts.py`); one process per host, one thread each, gloo. Every step is a whole training step
(`bench/cluster_host.py`), bytes are those that the interfaces' counters saw. The rivals take turns,
a step each, at every rate. Needs root and iproute2. docs/cluster.md says how to read it.

Four processes share the cores of one machine, so the time that a step computes is longer than on
four machines; the rates are chosen to go from links that hardly matter to links that are all that
matters. Ratios are compared, not times.
"""

import argparse
import dataclasses
import itertools
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import cluster_plot, common
from bench.cluster_host import FULL, SMALL, Size, model_of, share_of
from bench.cluster_predict import HOSTS, alone_name, median_curves, with_predictions
from bench.cluster_report import (
    BYTES,
    Case,
    Sample,
    alone_row,
    prediction_table,
    scaling_row,
    sweep_row,
    targets,
    with_efficiency,
)
from bench.hosts import Hosts, Workers, address, hosts
from headway.config import MeshConfig
from headway.plan.link import Curve, parse_curve

UNLIMITED = 0.0
WEAK_K = 4


def cases(ks: list[int], size: Size, ranks: int = HOSTS) -> list[Case]:
    """The rivals at every k, on `ranks` hosts."""
    apart = MeshConfig(ep=ranks, ep_scheme="all_to_all", chunks=1)
    all_cases = []
    for k in ks:
        flat = model_of("moe", k, size, ranks)
        heads = model_of("multi_head_latent", k, size, 2)
        all_cases += [
            Case("EP", k, dataclasses.replace(apart, dedup=False), flat),
            Case("EP dedup", k, apart, flat),
            Case("EP dedup, 2 chunks", k, dataclasses.replace(apart, chunks=2), flat),
            Case("LatentMoE EP", k, apart, model_of("latent", k, size, ranks)),
            Case("HP", k, MeshConfig(hp=ranks, chunks=1), heads),
            Case("HP, 2 chunks", k, MeshConfig(hp=ranks, chunks=2), heads),
        ]
        if ranks == HOSTS:
            both = MeshConfig(hp=2, ep=2, ep_scheme="all_to_all", chunks=1)
            all_cases.append(Case("HP×EP", k, both, heads))
            two = dataclasses.replace(both, chunks=2)
            all_cases.append(Case("HP×EP, 2 chunks", k, two, heads))
    return all_cases


class Cluster:
    """The hosts with their processes, and the rate at which they are connected."""

    def __init__(self, where: Hosts, workers: Workers, size: Size) -> None:
        self.where, self.workers, self.size = where, workers, size
        self.mbit = UNLIMITED

    def form(self, world: int) -> str:
        """Jobs of `world` hosts each, as many as there is room for: all hosts work all the time,
        whatever the size of a job. The dtype of the matmuls."""
        self.limit(UNLIMITED)
        commands = [
            {
                "do": "join",
                "rank": host % world,
                "world": world,
                "address": address(host - host % world),
                "port": _port(),
            }
            for host in range(HOSTS)
        ]
        for host, command in enumerate(commands):
            command["port"] = commands[host - host % world]["port"]
        return self.workers.ask(commands)[0]["dtype"]

    def limit(self, mbit: float) -> None:
        """Rate of all links from now on."""
        self.where.shape(mbit or None)
        self.mbit = mbit

    def build(self, case: Case) -> None:
        """A model on all hosts, and a first step."""
        self._all(
            "build",
            model=dataclasses.asdict(case.model),
            mesh=dataclasses.asdict(case.mesh),
            size=dataclasses.asdict(self.size),
            key=case.key,
        )
        self.step(case)

    def step(self, case: Case) -> Sample:
        """One step."""
        return Sample(self._all("step", key=case.key))

    def rates(self) -> dict[str, float]:
        """What a host computes while the others do the same: fields of `plan.machine.Machine`."""
        return self._all("rates", seconds=0.2, wide=512)[0]

    def curves(self) -> list[Curve]:
        """Plain collectives of several sizes with nothing else to do, and where links have no limit
        beside matmuls (`headway.measure.links`)."""
        overlap_cost = self.mbit == UNLIMITED
        answers = self._all(
            "curves", sizes=self.size.collectives, repeats=3, overlap_cost=overlap_cost
        )
        return [parse_curve(values) for values in answers[0]["curves"]]

    def _all(self, do: str, **arguments: Any) -> list[dict]:
        return self.workers.ask([{"do": do, **arguments} for _ in range(HOSTS)])


def _port() -> int:
    """A port that is free here is free there: nothing else runs in the namespaces."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Progress:
    """Lines on stderr with the time that is left, from predicted times."""

    def __init__(self, silent: bool) -> None:
        self.silent, self.started = silent, time.perf_counter()

    def say(self, text: str, left: float) -> None:
        """`left` in seconds."""
        if not self.silent:
            spent = time.perf_counter() - self.started
            print(f"[{spent:4.0f} s, about {left:.0f} s left] {text}", file=sys.stderr, flush=True)


def sweep(
    cluster: Cluster,
    swept: list[Case],
    rates: list[float],
    repetitions: int,
    dtype: str,
    progress: Progress,
) -> list[dict]:
    """Every case at every rate, a step each, again and again, and what the prediction needs in
    between: what else the machine does meanwhile falls on all of them."""
    single = [Case(alone_name(c), c.k, MeshConfig(), share_of(c.model, HOSTS)) for c in swept]
    alone = list({case.key: case for case in single}.values())
    progress.say(f"building {len(swept) + len(alone)} models", 2.0 * len(swept))
    for case in swept + alone:
        cluster.build(case)
    cluster.limit(UNLIMITED)
    oversubscription = HOSTS / len(os.sched_getaffinity(0))
    rates_row = {
        "bench": "rates",
        "measured": cluster.rates(),
        "oversubscription": oversubscription,
        "dtype": dtype,
    }
    rates = [UNLIMITED, *rates]
    took: dict[float, float] = {}
    measured: dict[float, list[list[Curve]]] = {mbit: [] for mbit in rates}
    samples: dict[tuple[str, float], list[Sample]] = defaultdict(list)
    for turn, mbit in itertools.product(range(repetitions), rates):
        last = max(took.values(), default=1.0 * len(swept))
        round_ = sum(took.get(m, last) for m in rates)
        left = round_ * (repetitions - turn - 1) + sum(
            took.get(m, last) for m in rates[rates.index(mbit) :]
        )
        progress.say(f"round {turn + 1} of {repetitions}, {mbit or 'no'} Mbit/s limit", left)
        started = time.perf_counter()
        cluster.limit(mbit)
        measured[mbit].append(cluster.curves())
        for case in swept + alone:
            samples[case.key, mbit].append(cluster.step(case))
        took[mbit] = time.perf_counter() - started
    rows: list[dict] = [rates_row]
    for mbit in rates:
        curves = [dataclasses.asdict(c) for c in median_curves(measured[mbit])]
        rows.append({"bench": "network", "mbit": mbit, "curves": curves})
        rows += [alone_row(case, mbit, samples[case.key, mbit]) for case in alone]
    base: dict[str, dict] = {}
    for mbit, case in itertools.product(rates, swept):
        steps, first = samples[case.key, mbit], base.get(case.key)
        row = sweep_row(case, mbit, steps, cluster.size, BYTES[dtype], first)
        base.setdefault(case.key, row)
        rows.append(row)
    return with_predictions(rows, swept, cluster.size)


def weak_scaling(
    cluster: Cluster, mbit: float, repetitions: int, progress: Progress
) -> Iterator[dict]:
    """The same work per host on 1, 2 and 4 hosts; the machine is equally busy each time."""
    for world in (1, 2, 4):
        progress.say(f"weak scaling: jobs of {world} at {mbit:g} Mbit/s", 15.0 * (4 // world))
        cluster.form(world)
        compared = [c for c in cases([WEAK_K], cluster.size, world) if c.name in ("EP dedup", "HP")]
        for case in compared:
            cluster.build(case)
        cluster.limit(mbit)
        calls = {c.key: lambda c=c: {"sample": cluster.step(c)} for c in compared}
        steps = common.interleaved(calls, repetitions, warmup=0)
        for case in compared:
            yield scaling_row(case, mbit, world, [r["sample"] for r in steps[case.key]])


def predict_again(saved: dict[str, Any], size: Size = FULL) -> dict[str, Any]:
    """Return a saved result with the predictions that `headway plan` makes now; what was measured,
    its machine and its commit stay."""
    rows = saved["rows"]
    ks = sorted({row["k"] for row in rows if row["bench"] == "sweep"})
    rows = with_predictions(rows, cases(ks, size), size)
    return {**saved, "rows": rows, "targets": targets(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser, data=False)
    parser.add_argument("--quick", action="store_true", help="fewer k, rates and repetitions")
    parser.add_argument("--rates", type=float, nargs="+", default=None, help="Mbit/s, falling")
    parser.add_argument("--ks", type=int, nargs="+", default=None, help="experts per token")
    parser.add_argument("--repetitions", type=int, default=0, help="steps per row")
    parser.add_argument(
        "--small", action="store_true", help="an absurdly small shape, to test this file"
    )
    parser.add_argument(
        "--predict", action="store_true", help="predict the saved rows again, run nothing"
    )
    args = parser.parse_args()
    if args.predict:
        path = common.NUMBERS / "cluster.json"
        result = predict_again(json.loads(path.read_text()))
        common.write(path, result)
        print(prediction_table(result["rows"]))
        return
    size = SMALL if args.small else FULL
    ks = args.ks or ([1, 4, 8] if args.quick else [1, 2, 4, 8])
    rates: list[float] = args.rates or (
        [1000, 250, 100] if args.quick else [2000, 1000, 500, 250, 125]
    )
    rates = sorted(rates, reverse=True)
    repetitions = args.repetitions or (2 if args.quick else 5)
    progress = Progress(args.small)
    command = [sys.executable, str(Path(__file__).with_name("cluster_host.py"))]
    with hosts(HOSTS) as where:
        workers = Workers(where, command)
        try:
            cluster = Cluster(where, workers, size)
            progress.say(f"starting {HOSTS} hosts", 15.0)
            dtype = cluster.form(HOSTS)
            rows = sweep(cluster, cases(ks, size), rates, repetitions, dtype, progress)
            rows += weak_scaling(cluster, rates[len(rates) // 2], repetitions, progress)
        finally:
            workers.close()
    rows = [row | {"dtype": dtype} for row in with_efficiency(rows)]
    shown = [row for row in rows if "step_ms" in row]
    common.print_rows([{k: v for k, v in row.items() if k in SHOWN} for row in shown])
    print(prediction_table(rows))
    common.report("cluster", rows, targets(rows), args)
    if args.save:
        path = common.ROOT / "docs" / "cluster.svg"
        path.write_text(cluster_plot.svg(rows))
        print(f"wrote {path.relative_to(common.ROOT)}")


SHOWN = """bench name mesh k hosts mbit step_ms wire_bytes ledger_bytes spread wait_ms predicted_ms
ratio efficiency""".split()


if __name__ == "__main__":
    try:
        common.run(main)
    except KeyboardInterrupt:
        sys.exit(130)
