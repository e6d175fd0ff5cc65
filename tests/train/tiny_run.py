"""A tiny model that the loop's tests train in a second, and what they compare.

Run as a script it trains that model: `python tiny_run.py FOLDER new|resume [async]`; a test kills that process.
"""

import dataclasses
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from headway.checkpoint import run_folder
from headway.config import (
    BalanceConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
)
from headway.report.sinks import read_metrics
from headway.train import loop

WALL_CLOCK = ("seconds", "tokens_per_second", "flops_per_second", "memory_gib")
WORDS = [
    "def",
    "return",
    "x",
    "y",
    "(",
    ")",
    "import",
    "\n",
    "for",
    "in",
    "range",
    "if",
    "else",
    "1",
    "2",
    "3",
    "+",
    "self",
    ".",
]


def make_text(path: Path) -> str:
    """The same 40 kB on every machine: random.Random is specified."""
    drawn = random.Random(0)
    path.write_text(" ".join(drawn.choices(WORDS, weights=range(1, len(WORDS) + 1), k=14_000)))
    return str(path)


def tiny(root: Path, **changes) -> Config:
    """Noise and a selection bias are on, so a resumed run needs random state and buffers to be
    right."""
    root.mkdir(exist_ok=True)
    config = Config(
        recipe="tiny",
        model=ModelConfig(
            n_layers=2,
            d_model=32,
            n_heads=2,
            moe=MoEConfig(
                n_heads=2,
                n_experts=4,
                top_k=2,
                d_expert=16,
                router=RouterConfig(noisy=True),
                balance=BalanceConfig(aux=0.01, z=1e-3, bias="sign"),
            ),
        ),
        data=DataConfig(
            source=(make_text(root / "text.txt"),),
            seq_len=32,
            batch_size=4,
            micro_batch_size=2,
            cache_dir=str(root / "cache"),
        ),
        optim=OptimConfig(steps=20, lr=5e-3, spike=20.0),
        run=RunConfig(
            dir=str(root / "run"),
            device="cpu",
            dtype="float32",
            log_every=3,
            eval_every=5,
            eval_tokens=256,
            sample_tokens=8,
            checkpoint_every=4,
        ),
    )
    for name, values in changes.items():
        config = dataclasses.replace(
            config, **{name: dataclasses.replace(vars(config)[name], **values)}
        )
    return config


def quiet(_: str) -> None:
    pass


def train(config, **options):
    return loop.train(config, log=options.pop("log", quiet), **options)


def records(root: Path) -> list[dict]:
    """What must not depend on interruptions."""
    written = read_metrics(root / "run" / "metrics.jsonl")
    return [
        {k: v for k, v in r.items() if k not in WALL_CLOCK} for r in written if "event" not in r
    ]


def events(root: Path) -> list[tuple[int, str]]:
    written = read_metrics(root / "run" / "metrics.jsonl")
    return [(r["step"], r["event"]) for r in written if "event" in r]


def assert_same_run(a: Path, b: Path, one: dict, other: dict) -> None:
    assert records(a) == records(b)
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(Path(one["checkpoint"]) / name)
        again = load_file(Path(other["checkpoint"]) / name)
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[key], again[key]) for key in tensors), name
    keys = ("val_bits_per_byte", "val_loss", "first_val_bits_per_byte", "loss", "sample", "steps")
    assert {k: one[k] for k in keys} == {k: other[k] for k in keys}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    resuming = sys.argv[2] == "resume"
    beside = {"async_checkpoint": "async" in sys.argv}
    config = run_folder.read_config(target / "run") if resuming else tiny(target, run=beside)
    loop.train(
        config,
        resume=target / "run" if resuming else None,
        log=lambda line: print(line, flush=True),
    )
