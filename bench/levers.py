"""What helps Multi-Head LatentMoE at small size: one lever at a time, at equal steps, data order
and active FLOPs.

    python bench/levers.py [--steps 250] [--batch 32] [--seed 0] [--only NAME ...] [--save]
    [--json]

Each run is short and its number is the validation bits/byte after a fixed number of steps, so the
machine's load does not matter. With --save every finished run goes to docs/numbers/levers.json, and
a run that is there is not repeated.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import add_options, data_config, load_rows, merge_row, print_rows, report, run
from bench.learn import Budget, trainer
from bench.shapes import equal_shape, parameters
from bench.texts import StreamText
from headway.config import BalanceConfig, Config, OptimConfig, RouterConfig
from headway.model.transformer import Transformer

OPTIM = OptimConfig(
    name="muon", lr=3e-3, muon_lr=0.02, beta2=0.99, warmup=0.05, decay=0.4, weight_decay=0.1
)


@dataclass(frozen=True)
class Lever:
    """One run: a shape, an optimiser, perhaps other initial weights."""

    shape: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    rescale: Callable[[Transformer], None] | None = None


def _scale(part: str, factor: float) -> Callable[[Transformer], None]:
    def rescale(model: Transformer) -> None:
        for name, p in model.named_parameters():
            if part in name:
                p.mul_(factor)

    return rescale


def _heads(
    rescale: Callable[[Transformer], None] | None = None, optim: dict | None = None, **shape
) -> Lever:
    """Two heads of width 64, the router reads the token, 8 narrow experts; `shape` changes that."""
    base = {"kind": "multi_head_latent", "head_width": 64, "router": TOKEN, "top_k": 8}
    return Lever({**base, **shape}, optim or {}, rescale)


def _flat(optim: dict | None = None, **shape) -> Lever:
    """A flat mixture of 8 narrow experts; `shape` changes that."""
    return Lever({"kind": "moe", "top_k": 8, **shape}, optim or {})


TOKEN = RouterConfig(reads="token")


def levers() -> dict[str, Lever]:
    """Every run by name, in the order in which they are run: two bases, and one change each."""
    sign = BalanceConfig(aux=0.0, bias="sign", bias_rate=0.02)
    quantile = BalanceConfig(aux=0.0, bias="quantile")
    return {
        "dense": Lever({"kind": "dense"}),
        "moe": _flat(),
        "2x64": _heads(),
        "2x64 no norm": _heads(latent_norm=False),
        "2x64 k 4": _heads(top_k=4),
        "2x64 k 16": _heads(top_k=16),
        "2x64 router reads its sub-token": _heads(router=RouterConfig()),
        "2x64 shared 128": _heads(d_shared=128),
        "4x32": _heads(head_width=32),
        "1x128": _heads(head_width=128),
        "4x64 (D_L 256)": _heads(d_latent=256),
        "moe k 4": _flat(top_k=4),
        "moe k 16": _flat(top_k=16),
        "moe aux 0.001": _flat(balance=BalanceConfig(aux=0.001)),
        "moe sign bias": _flat(balance=sign),
        "moe quantile bias": _flat(balance=quantile),
        "moe router lr x3": _flat(optim={"router_lr_scale": 3.0}),
        "moe expert lr x2": _flat(optim={"expert_lr_scale": 2.0}),
        "moe expert lr x0.5": _flat(optim={"expert_lr_scale": 0.5}),
        "moe muon lr x0.5": _flat(optim={"muon_lr": 0.01}),
        "moe experts by AdamW": _flat(optim={"muon_experts": False}),
        "moe adamw": _flat(optim={"name": "adamw"}),
        "moe gate scale 2": _flat(router=RouterConfig(scale=2.0)),
        "moe sigmoid": _flat(router=RouterConfig(gate="sigmoid", renormalize=True)),
        "moe softmax_topk": _flat(router=RouterConfig(gate="softmax_topk")),
        "moe shared 128": _flat(d_shared=128),
        "moe relu2": _flat(activation="relu2"),
        "2x64 expert lr x2": _heads(optim={"expert_lr_scale": 2.0}),
        "2x64 W_out x2": _heads(_scale("ffn.w_out.weight", 2.0)),
        "2x64 W_in x2": _heads(_scale("ffn.w_in.weight", 2.0)),
        "2x64 router init x0.1": _heads(_scale("router.w_HEL", 0.1)),
        "2x64 gate scale 3": _heads(router=replace(TOKEN, scale=3.0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=32, help="windows of 128 bytes per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = StreamText(data_config(args, seq_len=128, batch_size=args.batch), seed=args.seed)
    rows = load_rows("levers") if args.save else []
    wanted = {name: lever for name, lever in levers().items() if not args.only or name in args.only}
    for name, lever in wanted.items():
        key = {"name": name, "steps": args.steps, "batch": args.batch, "seed": args.seed}
        if any(all(row[k] == v for k, v in key.items()) for row in rows):
            continue
        model = equal_shape(vocab_size=text.vocab_size, **lever.shape)
        config = Config(model=model, optim=replace(OPTIM, **lever.optim))
        curve = trainer(config, text, seed=args.seed, rescale=lever.rescale).advance(
            Budget(args.steps)
        )
        total, active = parameters(model)
        row = key | {
            "bits_per_byte": curve[-1].nats / math.log(2),
            "cpu_seconds": curve[-1].cpu_seconds,
            "total": total,
            "active": active,
            "n_experts": model.moe.n_experts,
            "d_expert": model.moe.d_expert,
        }
        rows.append(row)
        if args.save:
            merge_row("levers", row, tuple(key))
        print_rows([row])
    report("levers", rows, [], args)


if __name__ == "__main__":
    run(main)
