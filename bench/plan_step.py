"""How far `headway plan` is from the truth on this machine: predicted against measured step time of
one process.

    python bench/plan_step.py [--repetitions 3] [--steps 12] [--recipes NAME ...] [--json] [--save]

Each repetition measures the machine as `headway doctor --measure` does, predicts the recipes from
that, and trains each for a few steps with one thread; the measured time is the median step without
the first. One process sends nothing, so this tests the compute, memory and optimiser parts alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from headway import recipes
from headway.config import Config
from headway.data.tokenizer import load_tokenizer
from headway.measure.rates import measure_machine
from headway.plan.choose import rank_meshes
from headway.plan.describe import with_vocab
from headway.plan.machine import read_machine
from headway.plan.setting import Setting

RECIPES = ("demo", "moe", "latent", "multi_head_latent", "dense", "cpu_step")


def predicted(config: Config, file: Path) -> dict:
    """The one mesh of one process."""
    machine = read_machine(str(file))
    config = with_vocab(config, load_tokenizer(config.data.tokenizer).vocab_size)
    setting = Setting(config, machine, bytes_per_value=2 if machine.dtype == "bfloat16" else 4)
    return rank_meshes(setting, 1)["meshes"][0]


def measured(recipe: str, steps: int, folder: Path, options: list[str]) -> list[float]:
    """Seconds of each step but the first, from `headway train` in a process of its own."""
    command = [sys.executable, "-m", "headway", "train", recipe, "--run", str(folder)]
    command += ["--steps", str(steps), "--run.threads", "1", "--run.log-every", "1"]
    command += ["--run.eval-batches", "1", "--run.sample-tokens", "1", *options]
    subprocess.run(command, check=True, capture_output=True, cwd=common.ROOT)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r.get("tokens_per_second")]
    data = recipes.load(recipe).data
    return [data.batch_size * data.seq_len / r["tokens_per_second"] for r in records[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measured number")
    parser.add_argument("--data", default="", help="text; default: the standard library's sources")
    common.add_options(parser, data=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = ["--data", args.data] if args.data else []
    rows: list[dict] = [
        {"recipe": name, "predicted": [], "measured": [], "parts": []} for name in args.recipes
    ]
    with tempfile.TemporaryDirectory() as place:
        for i in range(args.repetitions):
            file = Path(place) / f"machine-{i}.json"
            measure_machine(file, seconds=args.seconds)
            for row in rows:
                name = row["recipe"]
                prediction = predicted(recipes.load(name), file)
                times = measured(name, args.steps, Path(place) / f"{name}-{i}", options)
                row["predicted"].append(prediction["step_seconds"])
                row["parts"].append(prediction["seconds"])
                row["measured"].append(statistics.median(times))
    for row in rows:
        pairs = zip(row["predicted"], row["measured"], strict=True)
        row["ratio"] = statistics.median(p / m for p, m in pairs)
        print(
            f"{row['recipe']:<18} predicted {1e3 * statistics.median(row['predicted']):6.0f} ms, "
            f"measured {1e3 * statistics.median(row['measured']):6.0f} ms, "
            f"predicted / measured {row['ratio']:.2f}"
        )
    common.report("plan_step", rows, [], args)


if __name__ == "__main__":
    common.run(main)
