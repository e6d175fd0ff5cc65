"""Dense, flat MoE, LatentMoE-acc and Multi-Head LatentMoE on one text, at equal executed FLOPs and
at equal CPU time.

    python bench/quality.py [--data PATH] [--minutes 4] [--steps 400] [--seeds 3] [--only NAME ...]
    [--dir DIR] [--quick]
                            [--json] [--save]

Width 128, 4 layers, windows of 128 bytes, 4,096 tokens per step, Muon, in this CPU's best dtype:
the recipes dense, moe, latent and multi_head_latent. Sparse models have the FLOPs per token and the
total parameters of the flat MoE within 1%, the dense one its FLOPs (`headway.lab`). `equal FLOPs`:
as many executed FLOPs of training as the flat MoE in --steps steps. `equal time`: as many CPU
seconds with one thread, at calibrated step times. Seeds change the initial weights and the order of
the data. Validation is the whole split. Intervals are 95%, Student's t over seeds; differences to
the dense and to the flat model are paired by seed. Runs are kept in DIR and never done twice. The
rows of docs/numbers/quality.json were measured before, by a loop that read 24 batches.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from headway import recipes
from headway.config import Config, ModelConfig, UsageError
from headway.lab.compare import compare
from headway.lab.experiment import Arm, Experiment
from headway.lab.match import Quantity, match, measure
from headway.lab.runs import read_result
from headway.plan.describe import with_vocab
from headway.report.sinks import read_metrics
from headway.train.budget import Budget

STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantile of Student's t by degrees of freedom."""
BASELINE = "moe"


def arms(data: dict, quick: bool = False) -> tuple[Arm, ...]:
    """What is compared; `data` are changes of the recipes' data section."""

    def recipe(name: str, **moe) -> Config:
        config = with_vocab(recipes.load(name))
        model = config.model
        if quick:
            model = dataclasses.replace(model, d_model=32, n_layers=1, n_heads=2)
            moe = {**moe, "d_latent": 16} if name == "latent" else moe
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **moe))
        section = dataclasses.replace(config.data, **data)
        return dataclasses.replace(config, model=model, data=section)

    flat = recipe("moe")
    both: tuple[Quantity, ...] = ("active-flops", "total-parameters")
    targets: dict[Quantity, float] = {q: measure(flat, q) for q in both}

    def sized(name: str, **moe) -> Config:
        wanted = {q: targets[q] for q in (both[:1] if name == "dense" else both)}
        return match(recipe(name, **moe), wanted).config

    heads = {f"multi-head latent L={(32 if quick else 128) // h}": h for h in (4, 2, 1)}
    return (
        Arm("dense", sized("dense")),
        Arm(BASELINE, flat),
        # K' = αK − 1 with α = 2 and K = 4: one expert per token pays for the projections
        Arm("latent-acc", sized("latent", top_k=7)),
        *(Arm(name, sized("multi_head_latent", n_heads=h)) for name, h in heads.items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="CPU minutes of the equal-time runs"
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of the equal-FLOPs runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="names of models, beside moe")
    parser.add_argument("--dir", default="runs/quality", help="folder of the runs")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="an absurdly small size: shows that it runs, proves nothing",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.steps, args.minutes = min(args.steps, 10), min(args.minutes, 0.005)
    data: dict = {"seq_len": 32, "batch_size": 16} if args.quick else {}
    known = arms({**data, **({"source": (args.data,)} if args.data else {})}, args.quick)
    names = [arm.name for arm in known]
    if unknown := sorted(set(args.only) - set(names)):
        raise UsageError(
            f"--only {unknown[0]!r} is no model of this bench; use one of {', '.join(names)}"
        )
    chosen = tuple(a for a in known if not args.only or a.name in (BASELINE, *args.only))
    budgets = {
        "equal FLOPs": Budget(steps=args.steps),
        "equal time": Budget(cpu_seconds=60 * args.minutes),
    }
    rows = []
    for name, budget in budgets.items():
        experiment = Experiment(chosen, tuple(range(args.seeds)), budget, BASELINE)
        comparison = compare(experiment, Path(args.dir))
        models = {arm.name: arm.config.model for arm in comparison.arms}
        for row in comparison.rows:
            folder = Path(args.dir) / "runs" / row["config_hash"]
            rows.append(_row(row, name, models[row["arm"]], folder, args))
    print(table(rows))
    common.report("quality", rows, targets(rows), args)


def _row(row: dict, budget: str, model: ModelConfig, folder: Path, args) -> dict:
    total, active = common.parameters(model)
    result = read_result(folder) or {}
    records = read_metrics(folder / "metrics.jsonl")
    return {
        "model": row["arm"],
        "budget": budget,
        "seed": row["seed"],
        "steps_budget": args.steps,
        "minutes_budget": args.minutes,
        "bits_per_byte": row["bits_per_byte"],
        "steps": result["steps"],
        "cpu_seconds": row["cpu_seconds"],
        "wall_seconds": result["seconds"],
        "total": total,
        "active": active,
        "n_experts": model.moe.n_experts,
        "top_k": model.moe.top_k,
        "d_expert": model.moe.d_expert,
        "curve": [
            {"step": r["step"], "bits_per_byte": r["val_bits_per_byte"]}
            for r in records
            if "val_bits_per_byte" in r
        ],
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval (Student's t; infinite for one value)."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    return statistics.mean(values), STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(
        len(values)
    )


def bits(rows: list[dict], budget: str, model: str) -> dict[int, float]:
    """Bits per byte by seed."""
    return {
        r["seed"]: r["bits_per_byte"] for r in rows if r["budget"] == budget and r["model"] == model
    }


def below(rows: list[dict], budget: str, model: str, other: str) -> list[float]:
    """How many bits per byte `model` lies below `other`, seed by seed."""
    mine, theirs = bits(rows, budget, model), bits(rows, budget, other)
    return [theirs[seed] - mine[seed] for seed in sorted(mine.keys() & theirs.keys())]


def table(rows: list[dict]) -> str:
    """Bits per byte with intervals, and the paired gain over dense and over flat MoE."""
    lines = [
        f"{'':12} {'model':26} {'bits/byte':>17} {'below dense':>17} {'below flat MoE':>17} "
        f"{'steps':>6} {'active':>9} {'total':>9}"
    ]
    for budget in ("equal FLOPs", "equal time"):
        for model in dict.fromkeys(row["model"] for row in rows):
            group = [r for r in rows if r["budget"] == budget and r["model"] == model]
            cells = [list(bits(rows, budget, model).values())]
            cells += [below(rows, budget, model, other) for other in ("dense", "moe")]
            shown = [
                f"{m:.4f} ± {h:.4f}" if c else ""
                for c in cells
                for m, h in [interval(c) if c else (0, 0)]
            ]
            steps = statistics.mean(r["steps"] for r in group)
            lines.append(
                f"{budget:12} {model:26} {shown[0]:>17} {shown[1]:>17} {shown[2]:>17} {steps:6.0f} "
                f"{group[0]['active']:9.0f} {group[0]['total']:9.0f}"
            )
    return "\n".join(lines)


def targets(rows: list[dict]) -> list[dict]:
    """Every sparse model below dense; the best head width at least as good as flat MoE; sizes equal
    within 3%.
    """
    found = []
    names = list(dict.fromkeys(row["model"] for row in rows))
    for budget in ("equal FLOPs", "equal time"):
        for model in names:
            if model != "dense" and (gains := below(rows, budget, model, "dense")):
                found.append(
                    common.target(
                        f"{budget}: {model} below dense, bits/byte",
                        statistics.mean(gains),
                        0.0,
                        True,
                    )
                )
        gains = {
            m: statistics.mean(g)
            for m in names
            if m.startswith("multi") and (g := below(rows, budget, m, "moe"))
        }
        if gains:
            best = max(gains, key=gains.__getitem__)
            found.append(
                common.target(f"{budget}: {best} below flat MoE, bits/byte", gains[best], 0.0, True)
            )
    active = [row["active"] for row in rows]
    if active:
        spread = max(active) / min(active) - 1
        found.append(
            common.target("largest over smallest active parameters, minus 1", spread, 0.03, False)
        )
    return found


if __name__ == "__main__":
    common.run(main)
