"""What helps Multi-Head LatentMoE at small size: one lever at a time, at equal steps, data order
and active FLOPs.

    python bench/levers.py [--steps 200] [--seed 0] [--only NAME ...] [--save] [--json]

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


def _mhl(
    width: int,
    rescale: Callable[[Transformer], None] | None = None,
    optim: dict | None = None,
    **shape,
) -> Lever:
    return Lever({"kind": "multi_head_latent", "head_width": width, **shape}, optim or {}, rescale)


def levers() -> dict[str, Lever]:
    """Every run by name, in the order in which they are run."""
    token, adamw, fast = (
        RouterConfig(reads="token"),
        {"name": "adamw"},
        {"muon_lr": 0.04, "lr": 6e-3},
    )
    flat, latent = (
        {"kind": "moe"},
        {"kind": "latent", "head_width": 64, "top_k": 7, "router": token},
    )
    sign = BalanceConfig(aux=0.0, bias="sign", bias_rate=0.02)
    one_by_one = {
        "gate scale 2": _mhl(32, router=replace(token, scale=2.0)),
        "norm": _mhl(32, router=token, latent_norm=True),
        "k 8": _mhl(32, router=token, top_k=8),
        "k 2": _mhl(32, router=token, top_k=2),
        "W_out x2": _mhl(32, _scale("ffn.w_out.weight", 2.0), router=token),
        "W_in x2": _mhl(32, _scale("ffn.w_in.weight", 2.0), router=token),
        "router init x0.1": _mhl(32, _scale("router.w_HEL", 0.1), router=token),
        "router lr x3": _mhl(32, optim={"router_lr_scale": 3.0}, router=token),
        "router lr x0.3": _mhl(32, optim={"router_lr_scale": 0.3}, router=token),
        "expert lr x2": _mhl(32, optim={"expert_lr_scale": 2.0}, router=token),
        "expert lr x0.5": _mhl(32, optim={"expert_lr_scale": 0.5}, router=token),
        "muon lr x2": _mhl(32, optim=fast, router=token),
        "D_L 256 (8x32)": _mhl(32, router=token, d_latent=256),
        "aux 0.001": _mhl(32, router=token, balance=BalanceConfig(aux=0.001)),
        "sign bias": _mhl(32, router=token, balance=sign),
        "quantile bias": _mhl(32, router=token, balance=BalanceConfig(aux=0.0, bias="quantile")),
        "relu2": _mhl(32, router=token, activation="relu2"),
        "gelu": _mhl(32, router=token, activation="gelu"),
        "sigmoid": _mhl(32, router=replace(token, gate="sigmoid", renormalize=True)),
        "softmax_topk": _mhl(32, router=replace(token, gate="softmax_topk")),
        "softmax_topk scale 4": _mhl(32, router=replace(token, gate="softmax_topk", scale=4.0)),
    }
    return {
        "moe": Lever(flat),
        "4x32": _mhl(32),
        "4x32 token": _mhl(32, router=token),
        "4x32 shared 128": _mhl(32, d_shared=128),
        "4x32 token shared 128": _mhl(32, router=token, d_shared=128),
        "2x64 token": _mhl(64, router=token),
        "2x64 token norm": _mhl(64, router=token, latent_norm=True),
        "moe shared 128": Lever({**flat, "d_shared": 128}),
        "4x32 token gate scale 2": one_by_one.pop("gate scale 2"),
        "dense": Lever({"kind": "dense"}),
        "2x64 token shared 128": _mhl(64, router=token, d_shared=128),
        **{f"4x32 token {name}": lever for name, lever in one_by_one.items()},
        "2x64": _mhl(64),
        "1x128 token": _mhl(128, router=token),
        "latent 64": Lever(latent),
        "moe muon lr x2": Lever(flat, fast),
        "moe gate scale 2": Lever({**flat, "router": RouterConfig(scale=2.0)}),
        "moe adamw": Lever(flat, adamw),
        "4x32 adamw": _mhl(32, optim=adamw),
        "4x32 token adamw": _mhl(32, optim=adamw, router=token),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = StreamText(data_config(args, seq_len=128, batch_size=6), seed=args.seed)
    rows = load_rows("levers") if args.save else []
    wanted = {name: lever for name, lever in levers().items() if not args.only or name in args.only}
    for name, lever in wanted.items():
        key = {"name": name, "steps": args.steps, "seed": args.seed}
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
