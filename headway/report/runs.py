"""Read a run folder into what the page draws: decimated series, and what was recorded once."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from headway.config import UsageError, leaves
from headway.report.sinks import read_metrics, unreadable

MAX_POINTS = 1000
"""Points drawn of one line; a chart is about as many pixels wide."""
MAX_CELLS = 240_000
"""Numbers of the heat map of one run (frames · layers · heads · experts): 1.4 MB of text."""
MAX_FRAMES = 200
"""Positions of the heat map's slider."""
MAX_SAMPLES = 40
"""Samples on the page, evenly spread over the run."""

SCALARS = (
    *"loss bits_per_byte val_loss val_bits_per_byte lr grad_norm tokens_per_second".split(),
    *"flops_per_second memory_gib wire_bytes wire_expected wire_wait balance_loss".split(),
    *"load_min load_p95 load_max dead val_calibration_error".split(),
)
"""Metrics that are drawn as a line over the run."""


def number(value: object) -> float | None:
    """Return a finite float, or None for anything else: a gap in the line."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def short(value: float | None, digits: int = 7) -> float | int | None:
    """Round to `digits` significant digits; a float32 holds 7."""
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def decimate(values: Sequence[float | None], limit: int = MAX_POINTS) -> list[int]:
    """Return the indices to draw, ascending: first and last, and of each equal interval its
    minimum, maximum and first gap. These are at most about `limit` (gaps come on top), and no peak
    is lost."""
    n = len(values)
    if n <= limit:
        return list(range(n))
    buckets = max(1, (limit - 2) // 2)
    keep = {0, n - 1}
    for b in range(buckets):
        inside = range(1 + b * (n - 2) // buckets, 1 + (b + 1) * (n - 2) // buckets)
        known = [(v, i) for i in inside if (v := values[i]) is not None]
        if known:
            keep.add(min(known)[1])
            keep.add(max(known)[1])
        if len(known) < len(inside):
            keep.add(next(i for i in inside if values[i] is None))
    return sorted(keep)


def evenly_spaced(n: int, limit: int) -> list[int]:
    """Return at most `limit` ≥ 2 of n indices, evenly spaced, first and last among them."""
    if n <= limit:
        return list(range(n))
    return sorted({round(i * (n - 1) / (limit - 1)) for i in range(limit)})


def _axis(records: Sequence[Mapping], keep: Sequence[int]) -> dict[str, list]:
    return {
        name: [short(number(records[i].get(name)), 9) for i in keep]
        for name in ("step", "tokens", "seconds")
    }


def _series(records: Sequence[Mapping], values: Sequence[float | None]) -> dict | None:
    if all(v is None for v in values):
        return None
    keep = decimate(values)
    drawn = [short(values[i]) for i in keep]
    return _axis(records, keep) | {"y": drawn, "recorded": len(values)}


def _last_of_each_step(records: Sequence[dict]) -> list[dict]:
    """Sort by step; of several records of one step, which a resumed run repeats, keep the last."""
    return [r for _, r in sorted({r["step"]: r for r in records}.items())]


def _load(records: Sequence[dict]) -> dict | None:
    """Return the frames of the heat map: [frame][layer][head][expert]."""
    records = [r for r in records if r.get("load")]
    if not records:
        return None
    cells = sum(len(head) for layer in records[-1]["load"] for head in layer)
    keep = evenly_spaced(len(records), max(2, min(MAX_FRAMES, MAX_CELLS // max(1, cells))))
    frames = [
        # 4 digits: 0.0003 is not dead
        [[[short(number(v), 4) for v in head] for head in layer] for layer in records[i]["load"]]
        for i in keep
    ]
    return _axis(records, keep) | {"frames": frames, "cells": cells, "recorded": len(records)}


def _entropy(records: Sequence[dict]) -> list[dict]:
    """Return one series per sparse layer."""
    records = [r for r in records if r.get("entropy")]
    layers = max((len(r["entropy"]) for r in records), default=0)
    out = []
    for layer in range(layers):
        rows = (r["entropy"] for r in records)
        values = [number(row[layer]) if layer < len(row) else None for row in rows]
        if series := _series(records, values):
            out.append(series | {"layer": layer})
    return out


def _wire_layers(records: Sequence[dict]) -> list[dict]:
    """Return one row per layer that sends: means over the intervals of the run."""
    rows: dict[int, list[dict]] = {}
    for record in records:
        columns = record.get("wire_layers") or {}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            rows.setdefault(int(row["layer"]), []).append(row)
    return [
        {name: short(sum(row[name] for row in group) / len(group)) for name in group[0]}
        for _, group in sorted(rows.items())
    ]


def _reliability(evaluations: Sequence[dict]) -> list[dict]:
    """Return the bins of the last evaluation that has some."""
    columns = next((r["reliability"] for r in reversed(evaluations) if r.get("reliability")), {})
    rows = zip(*columns.values(), strict=True)
    return [{k: short(v) for k, v in zip(columns, row, strict=True)} for row in rows]


def _read_run_json(folder: Path) -> dict:
    path = folder / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "give a folder made by `headway train`"
        raise UsageError(f"no run at {folder} (it has no run.json); {fix}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}); restore it or give another run") from None
    if not isinstance(info, dict):
        problem = f"holds a {type(info).__name__}, not an object"
        raise UsageError(f"{path} {problem}; restore it or give another run")
    return info


def _headline(
    info: Mapping, train: list[dict], evaluations: list[dict], total_steps: float | None
) -> dict:
    last = train[-1] if train else {}
    end = max([*train, *evaluations], key=lambda r: r["step"], default={})
    speeds = sorted(v for r in train if (v := number(r.get("tokens_per_second"))) is not None)
    bits = [v for r in evaluations if (v := number(r.get("val_bits_per_byte"))) is not None]
    parameters = info.get("parameters") or {}
    return {
        "parameters_total": number(parameters.get("total")),
        "parameters_active": number(parameters.get("active")),
        "val_first": short(bits[0]) if bits else None,
        "val_last": short(bits[-1]) if bits else None,
        "val_best": short(min(bits)) if bits else None,
        "evaluations": len(bits),
        "step": end.get("step"),
        "steps": total_steps,
        "tokens": number(end.get("tokens")),
        "seconds": number(end.get("seconds")),
        "tokens_per_second": short(speeds[len(speeds) // 2]) if speeds else None,
        **{
            name: short(number(last.get(name)))
            for name in ("memory_gib", "load_min", "load_p95", "load_max", "dead", "skipped")
        },
    }


def _leak(overlap: Mapping | None) -> dict[str, str]:
    """Return what validation and training share: `sentence`, and `short` where it is something."""
    overlap = overlap or {}
    n, of = overlap.get("shared") or 0, overlap.get("validation_documents")
    short = f"{n:,} of {of:,} validation documents are trained on" if n else ""
    return {"sentence": str(overlap.get("sentence") or ""), "short": short}


def _texts(values: Mapping | None) -> dict[str, str]:
    return {str(k): str(v) for k, v in (values or {}).items() if v is not None}


def load_run(folder: str | Path) -> dict:
    """Return everything the page needs of one run folder (run.json and metrics.jsonl), as plain
    JSON values. Raises UsageError for a missing or corrupt file. The run may still be going, or be
    killed."""
    folder = Path(folder)
    info = _read_run_json(folder)
    records = read_metrics(folder / "metrics.jsonl")
    records = [r for r in records if number(r.get("step")) is not None]
    train = _last_of_each_step([r for r in records if "loss" in r])
    evaluations = _last_of_each_step(
        [r for r in records if "val_loss" in r or "val_bits_per_byte" in r]
    )
    samples = _last_of_each_step([r for r in records if "sample" in r])
    drawn = [samples[i] for i in evenly_spaced(len(samples), MAX_SAMPLES)]
    series = {}
    for name in SCALARS:
        source = evaluations if name.startswith("val_") else train
        if line := _series(source, [number(r.get(name)) for r in source]):
            series[name] = line
    config = info.get("config")
    config = config if isinstance(config, Mapping) else {}
    total_steps = number((config.get("optim") or {}).get("steps"))
    return {
        "name": folder.resolve().name,
        "headline": _headline(info, train, evaluations, total_steps),
        "intervals": len(train),
        "series": series,
        "entropy": _entropy(train),
        "load": _load(train),
        "wire_layers": _wire_layers(train),
        "reliability": _reliability(evaluations),
        "samples": [
            {
                "step": r["step"],
                **{name: number(r.get(name)) for name in ("tokens", "seconds")},
                **{name: str(r.get(name) or "") for name in ("prompt", "sample")},
            }
            for r in drawn
        ],
        "samples_recorded": len(samples),
        "events": [
            {"step": r["step"], "event": str(r["event"]), "detail": str(r.get("detail") or "")}
            for r in records
            if "event" in r
        ],
        "config": leaves(dict(config)),
        "derived": _texts(info.get("derived")),
        "commit": str(info.get("commit") or "unknown"),
        "dirty": bool(info.get("dirty")),
        "versions": _texts(info.get("versions")),
        "machine": _texts(info.get("machine")),
        "validation": {
            name: str((info.get("validation") or {}).get(name) or "")
            for name in ("fingerprint", "sentence")
        },
        "leak": _leak(info.get("overlap")),
        "approximate": [str(why) for why in info.get("approximate") or ()],
        "recipe_source": str(info.get("recipe_source") or ""),
    }
