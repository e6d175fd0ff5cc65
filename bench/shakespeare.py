"""Characters of tinyshakespeare: a Headway sparse recipe against nanoGPT's CPU recipe, loss against
time.

    python bench/shakespeare.py [--data PATH] [--seeds N] [--steps N] [--dir DIR] [--quick] [--json]
    [--save]

The control is nanoGPT's recipe (bench/nanogpt.py): 4 layers × 128, context 64, batch 12, 2,000
steps of AdamW. Its training time, evaluation left out, is the unit. Ours runs twice: with 38% of
that time, where it has to reach the control's published loss (1.886 nats per character, and the
loss that the control itself reached here), and with all of it, where it has to be 0.15 nats lower.
Time is process CPU time with one thread, for ours in steps of a calibrated time; wall time is
reported beside it. Validation is the last 10% of the text, all of it, in windows of 64 characters.
"""

import argparse
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, nanogpt
from headway.config import Config, MoEConfig
from headway.lab.experiment import Arm, Experiment
from headway.lab.runs import execute
from headway.recipes.cpu import shakespeare
from headway.report.sinks import read_metrics
from headway.train.budget import Budget

PUBLISHED = 1.886
"""Nats per character that nanoGPT's own code reached with this recipe."""
SHARE = 0.38
"""Of the control's time; the bound is 0.4, the rest is for the noise of the clock."""


DENSE = "headway dense with the same optimiser, equal time"


def dense(config: Config) -> Config:
    """The same without experts: a dense network of width 4·D, to tell the layer's share of the gain
    from that of the rest of the recipe.
    """
    model = replace(config.model, d_ff=4 * config.model.d_model, moe=MoEConfig(kind="dense"))
    return replace(config, model=model)


def smallest(config: Config) -> Config:
    """The same with one narrow layer, for tests."""
    moe = replace(config.model.moe, d_expert=8)
    return replace(config, model=replace(config.model, n_layers=1, d_model=16, n_heads=2, moe=moe))


def ours(name: str, config: Config, seed: int, cpu_seconds: float, root: Path) -> dict:
    """Train one of ours for that long and return its row."""
    experiment = Experiment((Arm(name, config),), (seed,), Budget(cpu_seconds=cpu_seconds))
    (arm,) = experiment.plan()
    run = arm.run(seed)
    result = execute(run, root)
    per_step = result["cpu_seconds"] / result["steps"]
    records = read_metrics(root / "runs" / run.key / "metrics.jsonl")
    curve = [
        nanogpt.Point(
            r["step"], r["step"] * per_step, r["seconds"], r["val_bits_per_byte"] * math.log(2)
        )
        for r in records
        if "val_bits_per_byte" in r and r["step"]
    ]
    return _row(name, seed, curve)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000, help="of the control")
    parser.add_argument("--dir", default="runs/shakespeare", help="folder of the runs")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="an absurdly small size: shows that it runs, proves nothing",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(args.dir)
    path = args.data or str(common.ROOT.parent / "shared" / "data" / "tinyshakespeare.txt")
    config = smallest(shakespeare()) if args.quick else shakespeare()
    config = replace(config, data=replace(config.data, source=(path,)))
    rows = []
    for seed in range(args.seeds):
        curve = nanogpt.train(path, seed, args.steps, 16 if args.quick else 128)
        budget = curve[-1].cpu_seconds
        rows.append(_row("control", seed, curve))
        for name, arm, share in (
            ("headway, 38% of the time", config, SHARE),
            ("headway, equal time", config, 1.0),
            (DENSE, dense(config), 1.0),
        ):
            rows.append(ours(name, arm, seed, share * budget, root))
        common.print_rows([{k: v for k, v in row.items() if k != "curve"} for row in rows[-4:]])
    common.report("shakespeare", rows, targets(rows), args)


def _row(name: str, seed: int, curve: list[nanogpt.Point]) -> dict:
    points = [asdict(point) for point in curve]
    return {"name": name, "seed": seed, **points[-1], "curve": points}


def targets(rows: list[dict]) -> list[dict]:
    """Time to the control's loss, and the gain at equal time; means over seeds."""

    def of(name: str) -> list[dict]:
        return [row for row in rows if row["name"] == name]

    theirs, fast, full = of("control"), of("headway, 38% of the time"), of("headway, equal time")
    found = []
    for label, bound in (
        ("1.886 nats", lambda c: PUBLISHED),
        ("the control's own loss", lambda c: c["nats"]),
    ):
        for clock in ("cpu_seconds", "wall_seconds"):
            shares = [
                _reached(ours, bound(c), clock) / c[clock]
                for c, ours in zip(theirs, fast, strict=True)
            ]
            found.append(
                common.target(
                    f"share of the control's {clock} to {label}",
                    statistics.mean(shares),
                    0.4,
                    False,
                )
            )
    gain = statistics.mean(c["nats"] - o["nats"] for c, o in zip(theirs, full, strict=True))
    found.append(common.target("nats below the control at equal CPU time", gain, 0.15, True))
    return found


def _reached(row: dict, nats: float, clock: str) -> float:
    """When the run's evaluations first reach a loss; infinite if they do not."""
    return next((point[clock] for point in row["curve"] if point["nats"] <= nats), float("inf"))


if __name__ == "__main__":
    common.run(main)
