"""A training step on the CPU against Hugging Face Transformers' OLMoE of the same shape: speed and peak memory.

    python bench/cpu_step.py [--data PATH] [--repetitions N] [--threads N] [--all] [--json] [--save]

D 384, 6 layers, 6 heads, 32 experts, top-4, F 192, S 256, B 8, V 512. A step is forward, backward, clipping by the
global norm, and AdamW (fused on both sides). The rivals take turns in one process; what is compared is the ratio of
median times with the peer's best `experts_implementation` and dtype. Peak memory is measured in a process of its own.
bfloat16 takes part where this CPU multiplies it natively; `--all` forces it, and the peer's `batched_mm`, which gathers
a weight matrix per row (28 GB of gathers per layer at this size).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.shapes import parameters
from bench.texts import StreamText
from headway.config import Config, ModelConfig, MoEConfig, OptimConfig, RunConfig, UsageError
from headway.model.balance import balance_loss
from headway.model.transformer import Transformer
from headway.train.optim import build_optimizers, clip_factor, global_grad_norm

Step = Callable[[Tensor, Tensor], dict]
SHAPE = ModelConfig(vocab_size=512, d_model=384, n_layers=6, n_heads=6, moe=MoEConfig(kind="moe"))
SMALL = ModelConfig(
    vocab_size=512,
    d_model=32,
    n_layers=1,
    n_heads=2,
    moe=MoEConfig(kind="moe", n_experts=4, top_k=2, d_expert=16),
)


def ours(
    model: ModelConfig, dtype: torch.dtype, recompute: bool = False, state: str = "float32"
) -> Config:
    """A Headway side."""
    optim = OptimConfig(lr=3e-4, state_dtype="bfloat16" if state == "bfloat16" else "float32")
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return Config(model=model, optim=optim, run=RunConfig(dtype=name, recompute=recompute))


def headway_step(config: Config) -> Step:
    """Build a Headway model; the step returns the seconds of its phases."""
    dtype = torch.bfloat16 if config.run.dtype == "bfloat16" else torch.float32
    model = Transformer(config.model, dtype=dtype, recompute=config.run.recompute, seed=0)
    optimizers = build_optimizers(model, config.optim, newton_schulz_dtype=dtype)
    optimizers.set_lr(1.0)

    def step(tokens_BS: Tensor, targets_BS: Tensor) -> dict:
        t0 = time.perf_counter()
        out = model(tokens_BS, targets_BS)
        loss = out.nats / targets_BS.numel() + balance_loss(out.stats, config.model.moe.balance)
        t1 = time.perf_counter()
        loss.backward()
        t2 = time.perf_counter()
        factor = clip_factor(float(global_grad_norm(model.parameters())), config.optim.clip)
        t3 = time.perf_counter()
        optimizers.step(factor)
        optimizers.zero_grad()
        return _phases(t0, t1, t2, t3, time.perf_counter(), loss.item())

    return step


def peer_step(model: ModelConfig, implementation: str, dtype: torch.dtype) -> Step:
    """Build OLMoE of the same shape; the step returns the seconds of its phases."""
    try:
        from transformers import OlmoeConfig, OlmoeForCausalLM
    except ImportError:
        raise UsageError(
            "cpu_step compares with transformers; pip install 'transformers>=5'"
        ) from None
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.moe.d_expert,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_heads,
        num_experts=model.moe.n_experts,
        num_experts_per_tok=model.moe.top_k,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        experts_implementation=implementation,
        output_router_logits=False,
    )
    peer = OlmoeForCausalLM(config).to(dtype)
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


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rivals(shape: ModelConfig, everything: bool) -> dict[str, Callable[[], Step]]:
    """What takes part, by name; each is built only when called."""
    multi_head = replace(
        shape, moe=replace(shape.moe, kind="multi_head_latent", n_heads=shape.n_heads)
    )
    made: dict[str, Callable[[], Step]] = {}
    for dtype in (
        (torch.float32, torch.bfloat16) if everything or native_bfloat16() else (torch.float32,)
    ):
        name = str(dtype).removeprefix("torch.")
        for implementation in ("eager", "grouped_mm", *(("batched_mm",) if everything else ())):
            made[f"olmoe {implementation} {name}"] = lambda i=implementation, d=dtype: peer_step(
                shape, i, d
            )
        for kind, model in (("moe", shape), ("multi_head_latent", multi_head)):
            made[f"headway {kind} {name}"] = lambda m=model, d=dtype: headway_step(ours(m, d))
    return made


def lean(shape: ModelConfig, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    """Headway's options that save memory, for the memory rows only."""
    name = str(dtype).removeprefix("torch.")
    return {
        f"headway moe {name} recompute": lambda: headway_step(ours(shape, dtype, True)),
        f"headway moe {name} recompute bf16-state": lambda: headway_step(
            ours(shape, dtype, True, "bfloat16")
        ),
    }


def memory(name: str, args: argparse.Namespace) -> dict:
    """Peak memory of two steps of one rival, in a process of its own, in MiB."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--child",
        name,
        "--threads",
        str(args.threads),
    ]
    command += (
        ["--data", args.data] * bool(args.data) + ["--small"] * args.small + ["--all"] * args.all
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(name: str, make: Callable[[], Step], batches: list[tuple[Tensor, Tensor]]) -> None:
    """Two steps, then the peak resident size above that after the imports, and as a whole."""
    import torch._dynamo  # every torch optimiser imports it when it is built: 75 MiB that are nobody's step

    assert torch._dynamo
    if name.startswith("olmoe"):
        from transformers import OlmoeForCausalLM  # resolves lazily

        assert OlmoeForCausalLM
    before = _resident("VmRSS")
    step = make()
    for batch in batches[:2]:
        step(*batch)
    peak = _resident("VmHWM")
    print(json.dumps({"peak_mib": peak - before, "absolute_peak_mib": peak}))


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB. (getrusage's maximum would inherit the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def matmul_peak(dtype: torch.dtype, n: int) -> float:
    """Best rate of a square matmul, in GFLOP/s."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e9


def step_flops(model: ModelConfig, batch: int, length: int) -> float:
    """Multiplications and additions of forward and backward: 6 per active weight, and causal attention."""
    active = parameters(model)[1]
    return batch * length * (6 * active + 6 * model.n_layers * model.d_model * length)


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
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, batch, length = (SMALL, 2, 32) if args.small else (SHAPE, 8, 256)
    text = StreamText(common.data_config(args, seq_len=length, batch_size=batch), val_batches=0)
    batches = [text.train(i) for i in range(8)]
    made = rivals(shape, args.all)
    if args.child:
        child(
            args.child,
            (made | lean(shape, torch.float32) | lean(shape, torch.bfloat16))[args.child],
            batches,
        )
        return
    report(args, shape, batch, length, batches, made)


def report(
    args: argparse.Namespace,
    shape: ModelConfig,
    batch: int,
    length: int,
    batches: list[tuple[Tensor, Tensor]],
    made: dict[str, Callable[[], Step]],
) -> None:
    """Measure, print and write."""
    used = {name: memory(name, args) for name in [*made, *lean(shape, torch.float32)]}
    peaks: dict[str, list[float]] = {}

    def turn(step: Step, dtype: torch.dtype) -> Callable[[], dict]:
        turns = iter(range(10**9))

        def call() -> dict:
            peaks.setdefault(str(dtype), []).append(matmul_peak(dtype, 64 if args.small else 1536))
            return step(*batches[next(turns) % len(batches)])

        return call

    dtypes = {name: torch.bfloat16 if "bfloat16" in name else torch.float32 for name in made}
    calls = {name: turn(make(), dtypes[name]) for name, make in made.items()}
    measured = common.interleaved(calls, args.repetitions)
    rows = []
    for name, results in measured.items():
        seconds = statistics.median(r["seconds"] for r in results)
        peak = max(peaks[str(dtypes[name])])
        model = shape
        if "multi_head" in name:
            model = replace(
                shape, moe=replace(shape.moe, kind="multi_head_latent", n_heads=shape.n_heads)
            )
        phases = {
            k: statistics.median(r[k] for r in results)
            for k in ("forward", "backward", "clip", "optimizer")
        }
        rows.append(
            {
                "name": name,
                "tokens_per_second": batch * length / seconds,
                "seconds": seconds,
                **phases,
                "share_of_peak": step_flops(model, batch, length) / seconds / 1e9 / peak,
                "peak_gflops": peak,
                **used[name],
                "repetitions": [r["seconds"] for r in results],
            }
        )
    rows += [{"name": name, **used[name]} for name in used if name not in made]
    common.print_rows([{k: v for k, v in row.items() if k != "repetitions"} for row in rows])
    common.report("cpu_step", rows, targets(rows), args)


def targets(rows: list[dict]) -> list[dict]:
    """At least twice the peer's best rate, at most half of the memory of that same peer."""
    timed = [row for row in rows if "seconds" in row]
    peer = max(
        (r for r in timed if r["name"].startswith("olmoe")), key=lambda r: r["tokens_per_second"]
    )
    found = []
    for kind in ("moe", "multi_head_latent"):
        mine = max(
            (r for r in timed if f"headway {kind} " in r["name"]),
            key=lambda r: r["tokens_per_second"],
        )
        speed = mine["tokens_per_second"] / peer["tokens_per_second"]
        found.append(common.target(f"{kind}: tokens/s over {peer['name']}", speed, 2.0, True))
        size = mine["peak_mib"] / peer["peak_mib"]
        found.append(common.target(f"{kind}: peak memory over {peer['name']}", size, 0.5, False))
    return found


if __name__ == "__main__":
    common.run(main)
