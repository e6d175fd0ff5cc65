"""What every number of a run means: name, unit, formula, one line. The console line and the report
read this table.

The schema of metrics.jsonl (one JSON object per line) is these names plus the counters `step`,
`tokens`, `seconds`; a sample adds `prompt` and `sample`, an event adds `event` and `detail`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """One number that a run records."""

    name: str
    """Key in metrics.jsonl."""
    title: str
    """Heading in the report."""
    unit: str
    """Unit of the recorded value; empty for a ratio or a count."""
    formula: str
    """How it is computed."""
    meaning: str
    """What it tells, in one line."""


# per metric: name | title | unit, its formula, its meaning
_TABLE = """
loss | Training loss | nats/token
−(1/N) Σ log p(target), averaged over the interval
What the optimiser lowers, without balance terms; depends on the tokenizer.

bits_per_byte | Training bits/byte | bits/byte
Σ −log p(target) / (ln 2 · bytes of the target text)
The loss per byte of text: comparable across tokenizers.

val_loss | Validation loss | nats/token
−(1/N) Σ log p(target) over the validation windows
The loss on documents kept for validation; the page says if training has some of them.

val_bits_per_byte | Validation bits/byte | bits/byte
Σ −log p(target) / (ln 2 · bytes), over the validation windows
The number to compare runs by.

val_calibration_error | Calibration error |
Σ over bins of probability: share of the bin · |mean probability − share right|
Of the likeliest next token: 0 where it is right as often as its probability says.

reliability | Reliability of the last evaluation |
columns over bins of the probability of the likeliest token: n, confidence (mean), right (share)
Calibrated where both bars are equal; the first longer: too sure of itself.

lr | Learning rate |
peak rate · schedule(step)
Rate of the step; parts of the model may scale it.

grad_norm | Gradient norm |
√Σ g² over all parameters of all ranks, before clipping; mean over the interval
Spikes announce trouble; a step with a non-finite norm is skipped.

tokens_per_second | Throughput | tokens/s
tokens of the interval / its training time
Training speed over all ranks, without evaluation.

flops_per_second | FLOP rate | FLOP/s
FLOPs per token in training, as `headway describe` counts them · tokens/s
Useful FLOP/s; divided by the peak of the hardware it is MFU.

memory_gib | Memory | GiB
peak of the process (CPU: resident set; CUDA: allocated)
The largest amount held so far.

wire_bytes | Bytes sent | bytes/step
bytes that rank 0 sends when sub-tokens and outputs are exchanged, forward and backward
Counted at each collective of the hp and ep axes; gradients and statistics left out.

wire_expected | Bytes by formula | bytes/step
plan.volume: fixed in advance for Head Parallel, even and independent choices for Expert Parallel
What `headway plan` says of this mesh.

wire_wait | Waiting for communication | of the step
time in which the host of rank 0 was blocked in a collective / training time
What overlap has not hidden, and the time that other ranks were late.

wire_layers | Communication by layer | bytes/step
columns over blocks: layer; bytes and expected (sub-tokens, counted and by formula); \
weights (of FSDP, and gradients); wait (of the step)
A backward exchange belongs to the layer of its forward; sums over all layers to none.

skipped | Skipped steps | steps
count since step 0
Steps with a loss spike or a non-finite value, whose update was not applied.

balance_loss | Balance loss |
balance terms of the objective, with their coefficients
The part of the objective that evens out the experts.

load | Expert load | × fair share
tokens of the expert / (tokens of its head / experts per head)
1.0 is a fair share, 0.0 a dead expert; per layer, head and expert.

load_min | Least load | × fair share
minimum of the load over layers, heads and experts
The idlest expert.

load_p95 | 95th percentile of load | × fair share
95th percentile of the load over layers, heads and experts
How busy busy experts are.

load_max | Greatest load | × fair share
maximum of the load over layers, heads and experts
The busiest expert: it sets the pace when experts live on several ranks.

dead | Dead experts | experts
experts with load 0 in the interval
Parameters that no token reached.

entropy | Routing entropy | of log E
mean over tokens of −Σ p log p / log E, per sparse layer
1 is undecided (uniform), 0 is certain.
"""


def _metric(row: str) -> Metric:
    head, formula, meaning = row.split("\n")
    name, title, unit = (field.strip() for field in head.split("|"))
    return Metric(name, title, unit, formula, meaning)


METRICS = tuple(map(_metric, _TABLE.strip().split("\n\n")))


def _flatten(load: object) -> Iterator[float]:
    if isinstance(load, np.ndarray):
        yield from (float(v) for v in load.ravel())
    elif isinstance(load, Sequence):
        for part in load:
            yield from _flatten(part)
    else:
        yield float(load)  # type: ignore[arg-type]


def load_summary(load: Sequence | np.ndarray) -> dict[str, float | int]:
    """Summarise expert load for a metrics record.

    `load` is nested [layers][heads][experts], load / fair share (1.0 fair, 0.0 dead); layers may
    differ in shape. Returns load_min, load_p95, load_max (linear interpolation, as numpy) and dead
    (experts with load 0); an empty dict without sparse layers."""
    flat = np.fromiter(_flatten(load), dtype=np.float64)
    if flat.size == 0:
        return {}
    return {
        "load_min": float(flat.min()),
        "load_p95": float(np.percentile(flat, 95)),
        "load_max": float(flat.max()),
        "dead": int((flat == 0).sum()),
    }


def duration(seconds: float | None) -> str:
    """Format seconds as `7s`, `3m12s`, `1h05m` or `2d03h`; `-` for None and non-finite values."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _text(record: Mapping, name: str, spec: str, scale: float = 1.0) -> str:
    value = record.get(name)
    return "-" if value is None else format(value * scale, spec)


def _wire(record: Mapping) -> tuple[str, ...]:
    """Format traffic and waiting; empty in a single process."""
    if record.get("wire_bytes") is None:
        return ()
    sent, wait = _text(record, "wire_bytes", ".2f", 1e-6), _text(record, "wire_wait", ".0%")
    return (f"wire {sent} MB/step wait {wait}",)


def progress_line(
    record: Mapping, total_steps: int, eta_seconds: float | None, peak_flops: float | None = None
) -> str:
    """Format one step interval: always the same fields in the same order, each value after its
    label.

    `record` is a training record of metrics.jsonl; a missing or None value prints as `-` (a dense
    run has no load). `eta_seconds` is the estimated time left. With `peak_flops` (FLOP/s of the
    hardware, all ranks) MFU stands in place of GFLOP/s."""
    step = f"{record['step']:>{len(str(total_steps))}d}/{total_steps}"
    if peak_flops:
        speed = f"MFU {_text(record, 'flops_per_second', '.1%', 1 / peak_flops):>6}"
    else:
        speed = f"GFLOP/s {_text(record, 'flops_per_second', '.1f', 1e-9):>6}"
    return "  ".join(
        (
            f"step {step}",
            f"loss {_text(record, 'loss', '.4f'):>7}",
            f"bits/byte {_text(record, 'bits_per_byte', '.4f'):>7}",
            f"lr {_text(record, 'lr', '.2e'):>8}",
            f"grad {_text(record, 'grad_norm', '.3f'):>6}",
            f"tokens/s {_text(record, 'tokens_per_second', '.0f'):>6}",
            speed,
            f"mem {_text(record, 'memory_gib', '.2f')} GiB",
            *_wire(record),
            f"load min {_text(record, 'load_min', '.2f')} p95 {_text(record, 'load_p95', '.2f')}"
            f" max {_text(record, 'load_max', '.2f')}",
            f"dead {_text(record, 'dead', 'd', 1)}",
            f"skipped {_text(record, 'skipped', 'd', 1)}",
            f"eta {duration(eta_seconds)}",
        )
    )
