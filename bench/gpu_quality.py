"""Does Multi-Head LatentMoE match a flat MoE at widths that need a GPU? One command, ten minutes.

    python bench/gpu_quality.py --plan [--json]       what would run; needs no GPU
    python bench/gpu_quality.py --dir DIR [--json]    on one H100; a call that was cut off goes on
    python bench/gpu_quality.py --dir DIR --small     the same at toy sizes on a CPU

Width 512 (8 layers, K·F = 3·D, sequences of 512 bytes, bfloat16): the flat mixture, eight heads of
64 as published, eight slices without projections, a single latent of D/2; two seeds of 45 s each.
Width 1,024: flat and slices, one seed of 70 s. Arms have flat's executed FLOPs per token and total
parameters (`headway.lab`), all of a width read the same tokens: as many as the slowest arm, as
calibrated, trains on in its time. The text is the sources of the installed PyTorch.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.gpu_whole import step_seconds
from bench.launches import step_of
from headway.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    UsageError,
)
from headway.lab.experiment import Arm, Experiment, PlannedArm
from headway.lab.runs import execute
from headway.lab.statistics import paired
from headway.train.budget import Budget

PEAK_TFLOPS = 790.6
"""bfloat16 matmul of an H100, measured (docs/numbers/gpu_day.json)."""
TEXT = str(Path(torch.__file__).parent)
FEWEST = 4096
"""Tokens of a run: so many that a sequence is a small part of them."""
LIMIT = 540
"""Seconds of everything."""


@dataclass(frozen=True)
class Part:
    """The arms of one width."""

    width: int
    layers: int
    seeds: tuple[int, ...]
    seconds: float
    """Of each run."""
    arms: tuple[str, ...]
    needed: float
    """Tokens per second that the plan counts on."""


PARTS = (
    Part(512, 8, (0, 1), 45, ("flat", "8 heads", "8 slices", "latent"), 600e3),
    Part(1024, 8, (0,), 70, ("flat", "8 slices"), 200e3),
)
SMALL = (Part(64, 2, (0, 1), 1, ("flat", "8 heads", "8 slices", "latent"), 2e3),)


def config(part: Part, arm: str, small: bool) -> Config:
    """An arm before its sizes are matched."""
    n, k = (32, 4) if small else (64, 8)
    moe = MoEConfig(kind="moe", n_experts=n, top_k=k, d_expert=3 * part.width // k)
    match arm:
        case "8 heads":
            moe = replace(moe, kind="multi_head_latent", n_heads=8)
        case "8 slices":
            moe = replace(moe, kind="multi_head_latent", n_heads=8, projection="none")
        case "latent":
            moe = replace(moe, kind="latent", d_latent=part.width // 2)
    length, batch = (16, 8) if small else (512, 128)
    model = ModelConfig(n_layers=part.layers, d_model=part.width, n_heads=part.width // 64, moe=moe)
    where = "cpu" if small else "cuda"
    text = str(common.ROOT / "headway" / "config") if small else TEXT
    return Config(
        recipe=arm,
        model=model,
        data=DataConfig(source=(text,), seq_len=length, batch_size=batch),
        optim=OptimConfig(name="muon", lr=1e-3, warmup_steps=4 if small else 50),
        run=RunConfig(device=where, dtype="float32" if small else "bfloat16", threads=1),
    )


def plan(part: Part, tokens: float, small: bool) -> tuple[PlannedArm, ...]:
    """The arms, matched, all on the same tokens."""
    arms = tuple(Arm(name, config(part, name, small)) for name in part.arms)
    # where no GPU is the sizes are the same
    if not small and not torch.cuda.is_available():
        arms = tuple(
            replace(a, config=replace(a.config, run=replace(a.config.run, device="cpu")))
            for a in arms
        )
    wanted = ("active-flops", "total-parameters")
    experiment = Experiment(
        arms,
        part.seeds,
        Budget(tokens=tokens),
        match=wanted,
        eval_tokens=1 << (11 if small else 19),
        evaluations=1,
    )
    planned = experiment.plan(lambda _: None)
    first = planned[0].config
    alike = []
    for arm in planned:
        optim = replace(arm.config.optim, steps=first.optim.steps)
        data = replace(arm.config.data, last_batch_size=first.data.last_batch_size)
        run = replace(arm.config.run, eval_every=first.optim.steps)
        alike.append(replace(arm, config=replace(arm.config, optim=optim, data=data, run=run)))
    return tuple(alike)


def calibrated(part: Part, small: bool) -> dict[str, float]:
    """Tokens per second of each arm, of a few steps on random tokens."""
    rates = {}
    for arm in plan(part, 1e6, small):
        dtype = torch.float32 if small else torch.bfloat16
        step = step_of(arm.config, dtype, torch.device(arm.config.run.device))
        for _ in range(1 if small else 3):
            step.run()
        seconds = [sum(step_seconds(step, not small)) for _ in range(2 if small else 5)]
        tokens = sum(batch.tokens_BS.numel() for batch in step.batch)
        rates[arm.name] = tokens / statistics.median(seconds)
        del step
    return rates


def planned_row(part: Part, arm: PlannedArm, rate: float) -> dict:
    """What a run of an arm costs."""
    return {
        "width": part.width,
        "arm": arm.name,
        "seeds": list(part.seeds),
        "solved": arm.solved,
        "mismatch": arm.mismatch,
        "active_parameters": arm.costs["active_parameters"],
        "total_parameters": arm.costs["total_parameters"],
        "flops_per_token": arm.costs["flops_per_token"],
        "tokens": arm.tokens,
        "tokens_per_second": rate,
        "mfu": rate * arm.costs["flops_per_token"] / PEAK_TFLOPS / 1e12,
        "seconds": arm.tokens / rate * len(part.seeds),
    }


def run_part(part: Part, small: bool, folder: Path) -> list[dict]:
    """Train every run of a width, flat first; rows of runs and of paired differences."""
    rates = calibrated(part, small)
    tokens = max(FEWEST, min(rates.values()) * part.seconds)
    arms, rows, bits = plan(part, tokens, small), [], {}
    for seed in part.seeds:
        for arm in arms:
            result = execute(arm.run(seed), folder)
            row = planned_row(part, arm, result["tokens_per_second"])
            keys = ("bits_per_byte", "batches_sha256", "config_hash", "error")
            rows.append(
                row | {"seed": seed, "seconds": result["seconds"]} | {k: result[k] for k in keys}
            )
            bits[arm.name, seed] = result["bits_per_byte"]
    for arm in part.arms[1:]:
        pairs = [(bits[arm, s], bits["flat", s]) for s in part.seeds]
        measured = [a - b for a, b in pairs if a is not None and b is not None]
        if measured:
            difference = dataclasses.asdict(paired(measured))
            rows.append({"width": part.width, "arm": arm, "baseline": "flat", **difference})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--small", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--dir", default="", help="folder of the runs")
    common.add_options(parser, data=False)
    args = parser.parse_args()
    parts, rows, start = SMALL if args.small else PARTS, [], time.monotonic()
    if args.plan:
        for part in parts:
            arms = plan(part, part.needed * part.seconds, args.small)
            rows += [planned_row(part, arm, part.needed) for arm in arms]
        seconds = sum(row["seconds"] for row in rows)
        targets = [common.target("seconds of training", seconds, LIMIT, False)]
    else:
        if not args.dir:
            raise UsageError("no folder for the runs; give one with --dir DIR, or print the --plan")
        if not args.small and not torch.cuda.is_available():
            raise UsageError(
                "there is no CUDA device; --small runs on a CPU, --plan prints the plan"
            )
        for part in parts:
            rows += run_part(part, args.small, Path(args.dir))
        targets = [common.target("seconds", time.monotonic() - start, LIMIT, False)]
        for part in parts:
            rates = [
                r["tokens_per_second"] for r in rows if r["width"] == part.width and "seed" in r
            ]
            name = f"width {part.width}: tokens/s of the slowest run"
            targets.append(common.target(name, min(rates), part.needed, True))
    for row in rows:
        print({k: v for k, v in row.items() if k not in ("batches_sha256", "config_hash", "error")})
    common.report("gpu_quality", rows, targets, args)


if __name__ == "__main__":
    common.run(main)
