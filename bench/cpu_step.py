"""A training step on the CPU against Hugging Face Transformers' OLMoE of the same shape: speed and
peak memory.

    python bench/cpu_step.py [--data PATH] [--repetitions N] [--threads N] [--all] [--json] [--save]

D 384, 6 layers, 6 heads, 32 experts, top-4, F 192, S 256, B 8, V 512. A step is forward, backward,
clipping by the global norm, and AdamW (fused on both sides). Each rival is built in a process of
its own, and they take turns, a step each. Compared are the ratio of median times, with the peer's
best `experts_implementation` and dtype, and the peak memory above that after the imports. bfloat16
rows keep AdamW's moments in bfloat16, as the peer keeps everything. `lean` rows use Headway's
options that save memory: recomputed experts, bfloat16 moments, an allocator that returns memory.
bfloat16 takes part where this CPU multiplies it natively; `--all` forces it, and the peer's
`batched_mm`, which gathers a weight matrix per row (28 GB of gathers per layer at this size).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.worker import Worker, work
from headway.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    UsageError,
)
from headway.data.shards import prepare
from headway.data.stream import Stream
from headway.data.tokenizer import load_tokenizer
from headway.kernels.precision import native_bfloat16
from headway.model.balance import balance_loss
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers, clip_factor
from headway.parallel.reduce import total_norm
from headway.plan.cost import model_costs
from headway.recipes.cpu import cpu_step
from headway.train.allocator import set_allocator

Step = Callable[[Tensor, Tensor], dict]
SHAPE = cpu_step().model
SMALL = ModelConfig(
    vocab_size=512,
    d_model=32,
    n_layers=1,
    n_heads=2,
    moe=MoEConfig(kind="moe", n_experts=4, top_k=2, d_expert=16),
)


def ours(model: ModelConfig, dtype: torch.dtype, fused: bool = False) -> Config:
    """A Headway side; `fused` takes the options that save memory. Moments are bfloat16 where the
    peer's are, which keeps its weights so too.
    """
    narrow = dtype == torch.bfloat16
    return Config(
        model=model,
        optim=OptimConfig(lr=3e-4, state_dtype="bfloat16" if fused or narrow else "float32"),
        run=RunConfig(
            dtype="bfloat16" if narrow else "float32",
            recompute=fused,
            allocator="return" if fused else "keep",
        ),
    )


def headway_step(config: Config) -> Step:
    """Build a Headway model; the step returns the seconds of its phases."""
    dtype = torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32
    set_allocator(config.run.allocator)
    model = Transformer(config.model, Compute(dtype=dtype, recompute=config.run.recompute), seed=0)
    optimizers = build_optimizers(model, config.optim, newton_schulz_dtype=dtype)
    optimizers.set_lr(1.0)

    def step(tokens_BS: Tensor, targets_BS: Tensor) -> dict:
        t0 = time.perf_counter()
        out = model(tokens_BS, targets_BS)
        loss = out.nats / targets_BS.numel() + balance_loss(out.stats, config.model.moe.balance)
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
        factor = clip_factor(float(norm), config.optim.clip)
        t3 = time.perf_counter()
        optimizers.step(factor)
        optimizers.zero_grad()
        return _phases(t0, t1, t2, t3, time.perf_counter(), loss.item())

    return step


def build_peer(
    model: ModelConfig,
    implementation: str,
    dtype: torch.dtype,
    length: int = 256,
    balance: bool = False,
) -> torch.nn.Module:
    """OLMoE of Transformers in the same shape, on torch's default device; with `balance` its loss
    has the balance loss added. `implementation` names its experts'.
    """
    try:
        from transformers import AutoModelForCausalLM, OlmoeConfig
    except ImportError as why:  # not there, or with other versions of what it needs
        fix = "pip install 'transformers>=5'"
        raise UsageError(f"this compares with transformers; {fix}: {str(why).strip()}") from None
    paths: dict[str, Any] = {  # keywords of every config, which its annotations lack
        "attn_implementation": "sdpa",
        "experts_implementation": implementation,
    }
    config = OlmoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.moe.d_expert,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads or model.n_heads,
        num_experts=model.moe.n_experts,
        num_experts_per_tok=model.moe.top_k,
        max_position_embeddings=length,
        **paths,
        output_router_logits=balance,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def peer_step(model: ModelConfig, implementation: str, dtype: torch.dtype) -> Step:
    """Build OLMoE of the same shape; the step returns the seconds of its phases."""
    torch.manual_seed(0)
    peer = build_peer(model, implementation, dtype)
    optimizer = torch.optim.AdamW(
        peer.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(tokens_BS: Tensor, targets_BS: Tensor) -> dict:
        t0 = time.perf_counter()
        # the peer shifts labels itself; one target fewer per sequence
        loss = peer(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        t3 = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        return _phases(t0, t1, t2, t3, time.perf_counter(), loss.item())

    return step


def _phases(t0: float, t1: float, t2: float, t3: float, t4: float, loss: float) -> dict:
    return {
        "seconds": t4 - t0,
        "forward": t1 - t0,
        "backward": t2 - t1,
        "clip": t3 - t2,
        "optimizer": t4 - t3,
        "loss": loss,
    }


def rivals(shape: ModelConfig, everything: bool) -> dict[str, Callable[[], Step]]:
    """Return the rivals by name; each is built when it is called."""
    steps: dict[str, Callable[[], Step]] = {}
    for dtype in (
        (torch.float32, torch.bfloat16)
        if everything or native_bfloat16(torch.device("cpu"))
        else (torch.float32,)
    ):
        name = str(dtype).removeprefix("torch.")
        for implementation in ("eager", "grouped_mm", *(("batched_mm",) if everything else ())):
            steps[f"olmoe {implementation} {name}"] = lambda i=implementation, d=dtype: peer_step(
                shape, i, d
            )
        for kind, model in (("moe", shape), ("multi_head_latent", multi_head(shape))):
            steps[f"headway {kind} {name}"] = lambda m=model, d=dtype: headway_step(ours(m, d))
            steps[f"headway {kind} {name} lean"] = lambda m=model, d=dtype: headway_step(
                ours(m, d, True)
            )
    return steps


def multi_head(shape: ModelConfig) -> ModelConfig:
    """Return the shape with as many heads as attention has: the same experts, and projections."""
    return replace(shape, moe=replace(shape.moe, kind="multi_head_latent", n_heads=shape.n_heads))


def matmul_peak(dtype: torch.dtype, n: int) -> float:
    """Return the best rate of a square matmul, in GFLOP/s."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--all", action="store_true", help="slow rivals too")
    parser.add_argument(
        "--small", action="store_true", help="an absurdly small shape, to test this file"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, batch, length = (SMALL, 2, 32) if args.small else (SHAPE, 8, 256)
    data = common.data_config(args, seq_len=length, batch_size=batch)
    stream = Stream(prepare(data, load_tokenizer("bytes"), lambda _: None), data, seed=0)
    batches = [(b.tokens_BS, b.targets_BS) for b in map(stream.batch, range(8))]
    steps = rivals(shape, args.all)
    if args.worker:
        _import_first(args.worker)
        step = steps[args.worker]
        work(lambda: lambda i, built=step(): built(*batches[i % len(batches)]))
    else:
        measure(args, shape, batch * length, list(steps))


def _import_first(name: str) -> None:
    """Import now what is imported late, so that it does not count as memory of a step."""
    import torch._dynamo  # by every torch optimiser when it is built: 75 MiB

    assert torch._dynamo
    if name.startswith("olmoe"):
        from transformers import OlmoeForCausalLM

        assert OlmoeForCausalLM


def measure(args: argparse.Namespace, shape: ModelConfig, n_tokens: int, names: list[str]) -> None:
    """Let the rivals take turns, print and write."""
    options = ["--threads", str(args.threads), *(["--data", args.data] if args.data else [])]
    options += ["--small"] * args.small + ["--all"] * args.all
    workers = {
        n: Worker([sys.executable, str(Path(__file__)), "--worker", n, *options]) for n in names
    }
    measured = common.interleaved(
        {n: w.step for n, w in workers.items()}, args.repetitions, warmup=2
    )
    for worker in workers.values():
        worker.close()
    peaks = {d: matmul_peak(d, 64 if args.small else 2048) for d in {_dtype(n) for n in names}}
    rows = [_row(n, results, shape, n_tokens, peaks[_dtype(n)]) for n, results in measured.items()]
    common.print_rows([{k: v for k, v in row.items() if k != "repetitions"} for row in rows])
    common.report("cpu_step", rows, targets(rows), args)


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def _row(name: str, results: list[dict], shape: ModelConfig, n_tokens: int, peak: float) -> dict:
    """Return the medians of one rival."""
    seconds = statistics.median(r["seconds"] for r in results)
    model = multi_head(shape) if "multi_head" in name else shape
    data = DataConfig(seq_len=32 if shape is SMALL else 256)
    flops = model_costs(Config(model=model, data=data), 1).training_flops
    return {
        "name": name,
        "tokens_per_second": n_tokens / seconds,
        "seconds": seconds,
        **{
            k: statistics.median(r[k] for r in results)
            for k in ("forward", "backward", "clip", "optimizer")
        },
        "share_of_peak": flops * n_tokens / seconds / 1e9 / peak,
        "peak_gflops": peak,
        "peak_mib": results[-1]["peak_mib"],
        "absolute_peak_mib": results[-1]["absolute_peak_mib"],
        "repetitions": [r["seconds"] for r in results],
    }


def targets(rows: list[dict]) -> list[dict]:
    """Return the bounds. The layer of the peer: at least twice its best rate, in at most half its
    memory. Multi-Head LatentMoE, which adds projections and has six times the rows: its rate.
    """
    peer = max(
        (r for r in rows if r["name"].startswith("olmoe")), key=lambda r: r["tokens_per_second"]
    )
    bounds = []
    for kind, bound in (("moe", 2.0), ("multi_head_latent", 1.0)):
        mine = [r for r in rows if r["name"].startswith(f"headway {kind} ")]
        fast = max(mine, key=lambda r: r["tokens_per_second"])
        speed = fast["tokens_per_second"] / peer["tokens_per_second"]
        size = fast["peak_mib"] / peer["peak_mib"]
        name = f"over {peer['name']}"
        bounds.append(common.target(f"{fast['name']}: tokens/s {name}", speed, bound, True))
        bounds.append(common.target(f"{fast['name']}: peak memory {name}", size, 1 / bound, False))
    return bounds


if __name__ == "__main__":
    common.run(main)
