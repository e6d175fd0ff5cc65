"""What a user runs on a GPU, verb by verb: train, resume, compile, eval, sample, the engine.

Each verb is a process, as a user starts it; each row holds its exit code and what it said. The
stage `user` of bench/gpu_day.py. Needs all dependencies of the package (tyro, tokenizers).
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from bench.common import ROOT

if TYPE_CHECKING:
    from bench.gpu_stages import Record

TOY = "--model.n-layers 1 --model.d-model 32 --model.n-heads 2 --model.moe.n-heads 2 "
TOY += "--model.moe.n-experts 4 --model.moe.top-k 2 --model.moe.d-expert 16 --data.seq-len 32"

BATCHES = {True: (1, 2), False: (1, 16, 128)}
"""Requests that the engine decodes together, in a dry run and on a GPU."""


def headway(verb: str, record: "Record", seconds: int = 120) -> dict:
    """The object that `headway VERB --json` ends with, and the seconds of the whole process."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if record.dry:  # the interpreter is for kernels; whole runs take the CPU's
        environment |= {"HEADWAY_TRITON": "0", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "headway", *verb.split(), "--json"]
    start = perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )
    took = perf_counter() - start
    print("$", verb, f"({took:.1f} s)", done.stdout[-3000:], done.stderr[-3000:], flush=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(last)}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"process_seconds": took}


def lines(run: Path, key: str) -> list[dict]:
    """Objects of a run's metrics.jsonl that hold a key."""
    text = (run / "metrics.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, text) if key in found]


def train(recipe: str, run: Path, options: str, record: "Record") -> dict:
    """A run by `headway train`; its last progress lines."""
    options += f" {TOY}" if record.dry else ""
    told = headway(f"train {recipe} --run {run} {options}", record, 180)
    rates = [m["tokens_per_second"] for m in lines(run, "tokens_per_second")]
    keys = ("val_bits_per_byte", "loss", "tokens", "process_seconds")
    return {k: told.get(k) for k in keys} | {
        "tokens_per_second": statistics.median(rates[len(rates) // 2 :]),
        "peak_gib": next((m["memory_gib"] for m in lines(run, "memory_gib")), None),
    }


def losses(run: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in lines(run, "loss")}


def resumed(folder: Path, record: "Record") -> dict:
    """The second half of a run, resumed from its checkpoint, beside the run itself."""
    steps = "--steps 8 --checkpoint-every 4 --run.log-every 1 --run.keep-checkpoints 9"
    train("demo", folder / "whole", steps + " --run.eval-tokens 4096", record)
    start = folder / "whole" / "checkpoints" / "step-000004"
    headway(f"train --resume {start} --run {folder / 'half'}", record)
    whole, half = losses(folder / "whole"), losses(folder / "half")
    gaps = [abs(half[s] - whole[s]) for s in half if s > 4]
    return {"steps": len(gaps), "largest_gap": max(gaps), "same_bits": not any(gaps)}


def evaluations(run: Path, record: "Record") -> dict:
    """Bits per byte of one checkpoint in float32, on this device and on the CPU."""
    values = {}
    for device in dict.fromkeys((record.device.type, "cpu")):
        told = headway(f"eval {run} --device {device} --dtype float32 --tokens 4096", record)
        values[f"{device} float32"] = told["val_bits_per_byte"]
    return values


def engine_text(run: Path, record: "Record") -> dict:
    """Greedy tokens of the engine, in float32, beside those of the whole prefix every time."""
    from headway.config import EngineConfig
    from headway.serve.engine import Engine
    from headway.serve.params import SamplingParams

    n_tokens = 4 if record.dry else 32
    engine = Engine.load(run, EngineConfig(max_len=128), "cpu" if record.dry else "cuda", "float32")
    prompts = [[(7 * i + j) % 200 for j in range(5 + 3 * i)] for i in range(8)]
    done = engine.generate(
        prompts, SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
    )
    same, total, gap = 0, 0, 0.0
    for prompt, (completion,) in zip(prompts, done, strict=True):
        tokens = list(prompt)
        for token in completion.tokens:
            with torch.no_grad():
                out = engine.model(torch.tensor([tokens], device=record.device))
            logits_V = out.logits_BSV[0, -1, : engine.tokenizer.vocab_size].float()
            gap = max(gap, (logits_V.max() - logits_V[token]).item())
            same, total = same + (logits_V.argmax().item() == token), total + 1
            tokens.append(token)
    return {"tokens": total, "same": same, "largest_gap": gap}


def engine_speed(run: Path, record: "Record") -> Iterator[dict]:
    """Milliseconds of a decoding step, and of a prompt, by batch; bfloat16."""
    from headway.config import EngineConfig
    from headway.serve.engine import Engine
    from headway.serve.params import SamplingParams

    for batch in BATCHES[record.dry]:
        length, n = (8, 4) if record.dry else (128, 64)
        sizes = EngineConfig(max_len=256, max_requests=batch, max_batch_tokens=8192)
        engine = Engine.load(run, sizes, "cpu" if record.dry else "cuda", "bfloat16")
        for _ in range(2):  # the first compiles
            prompts = [torch.randint(250, (length,)).tolist() for _ in range(batch)]
            for prompt in prompts:
                engine.add(prompt, SamplingParams(max_tokens=n, ignore_eos=True))
            marks = [perf_counter()]
            while engine.has_work:
                engine.step()
                marks.append(perf_counter())
        steps = [1e3 * (b - a) for a, b in pairwise(marks)]
        yield {
            "batch": batch,
            "first_step_ms": steps[0],
            "decode_step_ms": statistics.median(steps[len(steps) // 2 :]),
        }


def measure(record: "Record") -> None:
    """Every row of the stage: the engine's first, since each verb takes ten seconds to start. The
    dry run leaves out what differs in nothing but the size."""
    folder = (record.folder / "user_runs").absolute()
    few = "--steps 20 --run.log-every 2 --run.eval-tokens 65536 --run.sample-tokens 20"
    record.attempt("resume demo", lambda: resumed(folder, record))
    record.attempt("engine, greedy", lambda: engine_text(folder / "whole", record))
    _engine_rows(folder / "whole", record)
    if not record.dry:
        record.attempt("train small", lambda: train("small", folder / "a", few, record))
        _engine_rows(folder / "a", record)
    told = f"sample {folder / 'whole'} --tokens 20"
    record.attempt("sample", lambda: {"said": str(headway(told, record))[:300]})
    record.attempt("eval", lambda: evaluations(folder / "whole", record))
    if not record.dry:
        few += " --run.compile"
        record.attempt("train small, compiled", lambda: train("small", folder / "b", few, record))
        record.attempt("doctor", lambda: {"said": str(headway("doctor", record))[:2000]})


def _engine_rows(run: Path, record: "Record") -> None:
    rows = engine_speed(run, record)
    for _ in BATCHES[record.dry]:
        record.attempt(f"engine, {run.name}", lambda: next(rows))
