"""Dense, flat MoE, LatentMoE-acc and Multi-Head LatentMoE on one text, at equal active FLOPs and at
equal time.

    python bench/quality.py [--data PATH] [--minutes 4] [--steps 400] [--seeds 3] [--only NAME ...]
    [--quick]
                            [--json] [--save]

Width 128, 4 layers, windows of 128 bytes, 4,096 tokens per step, Muon, in this CPU's best dtype. At
this batch every model learns more per second than at 768 or 2,048 tokens, where Newton–Schulz,
whose cost does not depend on the batch, takes most of a step. All models have the same active
parameters per token within 3%, hence the same FLOPs per token; the sparse ones also have the same
total within one expert per layer (5%).
`equal FLOPs`: the same number of steps. `equal time`: the same CPU seconds of training with one
thread.
Both come from one trunk: the rate is constant after the warm-up (the `wsd` schedule), so a run may
branch off at any point, and from there let the rate fall over the last part of its own budget
exactly as if it had been alone. Seeds change the initial weights and the order of the data.
Intervals are 95%, Student's t over seeds; differences to the dense and to the flat model are paired
by seed. With --save each finished run is kept, and not repeated later.
"""

import argparse
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.learn import Budget, Point, trainer
from bench.shapes import equal_shape, parameters
from bench.texts import StreamText
from headway.config import Config, ModelConfig, OptimConfig, RouterConfig, UsageError

OPTIM = OptimConfig(
    name="muon", lr=3e-3, muon_lr=0.02, beta2=0.99, warmup=0.05, decay=0.4, weight_decay=0.1
)
TOP_K = 8
"""Many narrow experts: better than 4 of twice the width at every head width, and cheaper for Muon,
since Newton–Schulz costs the square of a matrix's narrow side."""
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantile of Student's t by degrees of freedom."""


def models(vocab_size: int, small: bool = False) -> dict[str, ModelConfig]:
    """What is compared, by name."""
    token = RouterConfig(reads="token")
    size = (
        {"vocab_size": vocab_size, "d_model": 32, "n_layers": 1, "n_heads": 2}
        if small
        else {"vocab_size": vocab_size}
    )
    # F is a multiple of 16, which fills the vectors of the kernels, where sizes stay within 3%
    widths = {8: 2, 16: 2, 32: 2} if small else {32: 2, 64: 16, 128: 2}
    heads = {
        f"multi-head latent L={L}": equal_shape(
            "multi_head_latent", head_width=L, top_k=TOP_K, multiple=multiple, router=token, **size
        )
        for L, multiple in widths.items()
    }
    return {
        "dense": equal_shape("dense", **size),
        "moe": equal_shape("moe", top_k=TOP_K, **size),
        # K' = αK − 1 with α = 2 and K = 4: one expert per token pays for the projections
        "latent-acc": equal_shape(
            "latent",
            head_width=list(widths)[1],
            top_k=7,
            multiple=2 if small else 16,
            router=token,
            **size,
        ),
        **heads,
    }


def branches(
    config: Config, text: StreamText, seed: int, budgets: dict[str, Budget], warmup: int
) -> dict[str, list[Point]]:
    """Train one trunk, and branch off it for each budget; the evaluations by budget."""
    trunk = trainer(config, text, seed=seed)
    left, curves = dict(budgets), {}

    def ready() -> list[str]:
        return [
            name
            for name, b in left.items()
            if b.used(trunk.step, trunk.cpu) >= 1 - config.optim.decay
        ]

    while left:
        trunk.hold(warmup, until=lambda: bool(ready()))
        for name in ready():
            curves[name] = trunk.fork().advance(left.pop(name), evaluations=5)
    return curves


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
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="an absurdly small size: shows that it runs, proves nothing",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.steps, args.minutes = min(args.steps, 10), min(args.minutes, 0.005)
    budgets = {
        "equal FLOPs": Budget(steps=args.steps),
        "equal time": Budget(cpu_seconds=60 * args.minutes),
    }
    shape = {"seq_len": 32, "batch_size": 2} if args.quick else {"seq_len": 128, "batch_size": 32}
    saved = common.load_rows("quality") if args.save else []
    rows = _same_budget(saved, args)
    done = {(row["model"], row["seed"]) for row in rows}
    for seed in range(args.seeds):
        text = StreamText(
            common.data_config(args, **shape), seed=seed, val_batches=4 if args.quick else 24
        )
        known = models(text.vocab_size, args.quick)
        if unknown := sorted(set(args.only) - set(known)):
            raise UsageError(
                f"--only {unknown[0]!r} is no model of this bench; use one of {', '.join(known)}"
            )
        for name, model in known.items():
            if (name, seed) in done or (args.only and name not in args.only):
                continue
            made = branches(
                Config(model=model, optim=OPTIM), text, seed, budgets, max(1, args.steps // 20)
            )
            for budget, curve in made.items():
                row = _row(name, model, budget, seed, curve, args)
                rows.append(row)
                if args.save:
                    common.merge_row(
                        "quality",
                        row,
                        ("model", "budget", "seed", "steps_budget", "minutes_budget"),
                    )
                common.print_rows([{k: v for k, v in row.items() if k != "curve"}])
    if args.save:  # another process may have added runs meanwhile
        rows = _same_budget(common.load_rows("quality"), args)
    print(table(rows))
    common.report("quality", rows, targets(rows), args)


def _same_budget(rows: list[dict], args: argparse.Namespace) -> list[dict]:
    wanted = (args.steps, args.minutes)
    return [row for row in rows if (row["steps_budget"], row["minutes_budget"]) == wanted]


def _row(
    name: str,
    model: ModelConfig,
    budget: str,
    seed: int,
    curve: list[Point],
    args: argparse.Namespace,
) -> dict:
    total, active = parameters(model)
    last = curve[-1]
    return {
        "model": name,
        "budget": budget,
        "seed": seed,
        "steps_budget": args.steps,
        "minutes_budget": args.minutes,
        "bits_per_byte": last.nats / math.log(2),
        "steps": last.step,
        "cpu_seconds": last.cpu_seconds,
        "wall_seconds": last.wall_seconds,
        "total": total,
        "active": active,
        "n_experts": model.moe.n_experts,
        "top_k": model.moe.top_k,
        "d_expert": model.moe.d_expert,
        "curve": [asdict(point) for point in curve],
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
