"""What helps Multi-Head LatentMoE at small size: one lever at a time, at equal steps, data order
and active FLOPs.

    python bench/levers.py [--steps 250] [--seed 0] [--only NAME ...] [--dir DIR] [--save] [--json]

Each run is short and its number is the validation bits/byte of the whole split after as many
executed FLOPs as the flat MoE in --steps steps, so the machine's load does not matter. Runs are
kept in DIR and never done twice. The rows of docs/numbers/levers.json were measured before, by a
loop of its own at 768 tokens per step.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import add_options, parameters, print_rows, report, run
from headway import recipes
from headway.config import BalanceConfig, Config, RouterConfig, UsageError
from headway.lab.experiment import Arm, Experiment
from headway.lab.match import Quantity, match, measure
from headway.lab.runs import execute
from headway.model.transformer import Transformer
from headway.plan.describe import with_vocab
from headway.train.budget import Budget

BASELINE = "moe"


def scale(part: str, factor: float, model: Transformer) -> None:
    """Multiply the initial values of the parameters whose names contain `part`."""
    for name, p in model.named_parameters():
        if part in name:
            p.mul_(factor)


def _arm(name: str, recipe: str, edit=None, optim: dict | None = None, **moe) -> Arm:
    """An arm with one change, of the FLOPs and total parameters of the flat MoE."""
    flat = with_vocab(recipes.load("moe"))
    config = with_vocab(recipes.load(recipe))
    layer = dataclasses.replace(config.model.moe, **moe)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, moe=layer),
        optim=dataclasses.replace(config.optim, **(optim or {})),
    )
    if name != BASELINE:
        both: tuple[Quantity, ...] = ("active-flops", "total-parameters")
        config = match(
            config, {q: measure(flat, q) for q in both[: 1 + (recipe != "dense")]}
        ).config
    return Arm(name, config, edit)


_heads: Callable[..., Arm] = partial(_arm, recipe="multi_head_latent")
"""Two heads of width 64, the router reads the token, 8 narrow experts."""
_flat: Callable[..., Arm] = partial(_arm, recipe="moe")
"""A flat mixture of 8 narrow experts."""


def levers() -> dict[str, Callable[[], Arm]]:
    """Every run by name, in the order in which they are run: two bases, and one change each."""
    sign = BalanceConfig(aux=0.0, bias="sign", bias_rate=0.02)
    quantile = BalanceConfig(aux=0.0, bias="quantile")
    changes: dict[str, Callable[..., Arm]] = {
        "dense": partial(_arm, recipe="dense"),
        "moe": _flat,
        "2x64": _heads,
        "2x64 no norm": partial(_heads, latent_norm=False),
        "2x64 k 4": partial(_heads, top_k=4),
        "2x64 k 16": partial(_heads, top_k=16),
        "2x64 router reads its sub-token": partial(_heads, router=RouterConfig()),
        "2x64 shared 128": partial(_heads, d_shared=128),
        "4x32": partial(_heads, n_heads=4),
        "1x128": partial(_heads, n_heads=1),
        "4x64 (D_L 256)": partial(_heads, d_latent=256, n_heads=4),
        "moe k 4": partial(_flat, top_k=4),
        "moe k 16": partial(_flat, top_k=16),
        "moe aux 0.001": partial(_flat, balance=BalanceConfig(aux=0.001)),
        "moe sign bias": partial(_flat, balance=sign),
        "moe quantile bias": partial(_flat, balance=quantile),
        "moe router lr x3": partial(_flat, optim={"router_lr_scale": 3.0}),
        "moe expert lr x2": partial(_flat, optim={"expert_lr_scale": 2.0}),
        "moe expert lr x0.5": partial(_flat, optim={"expert_lr_scale": 0.5}),
        "moe muon lr x0.5": partial(_flat, optim={"muon_lr": 0.01}),
        "moe experts by AdamW": partial(_flat, optim={"muon_experts": False}),
        "moe adamw": partial(_flat, optim={"name": "adamw"}),
        "moe gate scale 2": partial(_flat, router=RouterConfig(scale=2.0)),
        "moe sigmoid": partial(_flat, router=RouterConfig(gate="sigmoid", renormalize=True)),
        "moe softmax_topk": partial(_flat, router=RouterConfig(gate="softmax_topk")),
        "moe shared 128": partial(_flat, d_shared=128),
        "moe relu2": partial(_flat, activation="relu2"),
        "2x64 expert lr x2": partial(_heads, optim={"expert_lr_scale": 2.0}),
        "2x64 W_out x2": partial(_heads, edit=partial(scale, "ffn.w_out.weight", 2.0)),
        "2x64 W_in x2": partial(_heads, edit=partial(scale, "ffn.w_in.weight", 2.0)),
        "2x64 router init x0.1": partial(_heads, edit=partial(scale, "router.w_HEL", 0.1)),
        "2x64 gate scale 3": partial(_heads, router=RouterConfig(reads="token", scale=3.0)),
    }
    return {name: partial(change, name) for name, change in changes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    parser.add_argument("--dir", default="runs/levers", help="folder of the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = levers()
    if unknown := sorted(set(args.only) - set(known)):
        raise UsageError(f"--only {unknown[0]!r} is no lever; use one of {', '.join(known)}")
    arms = [
        make() for name, make in known.items() if not args.only or name in (BASELINE, *args.only)
    ]
    if args.data:
        arms = [dataclasses.replace(a, config=_reading(a.config, args.data)) for a in arms]
    rows = []
    planned = Experiment(tuple(arms), (args.seed,), Budget(steps=args.steps), BASELINE).plan()
    for arm in planned:
        result = execute(arm.run(args.seed), Path(args.dir))
        total, active = parameters(arm.config.model)
        rows.append(
            {
                "name": arm.name,
                "steps": result["steps"],
                "batch": arm.config.data.batch_size,
                "seed": args.seed,
                "bits_per_byte": result["bits_per_byte"],
                "cpu_seconds": result["cpu_seconds"],
                "total": total,
                "active": active,
                "n_experts": arm.config.model.moe.n_experts,
                "d_expert": arm.config.model.moe.d_expert,
            }
        )
        print_rows(rows[-1:])
    report("levers", rows, [], args)


def _reading(config: Config, source: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=(source,)))


if __name__ == "__main__":
    run(main)
