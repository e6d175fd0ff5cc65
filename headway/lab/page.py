"""The page of a comparison: table, forest plot, curves and Pareto plots, offline and without
scripts."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from headway.lab import svg
from headway.lab.compare import Comparison
from headway.report.html import static_page, write_html
from headway.report.sinks import read_metrics

STYLE = "".join(
    [
        ".chart { width: 100%; max-width: 760px; background: var(--card); border-radius: 10px; }",
        ".chart text { font-size: 11.5px; fill: var(--soft); }",
        ".grid { stroke: var(--grid); } .zero { stroke: var(--ink); stroke-dasharray: 3 3; }",
        ".thick { fill: none; stroke-width: 2.5; } .thin { fill: none; stroke-width: 1; }",
        ".thin { opacity: 0.5; } .seed { fill: var(--faint); }",
        ".band { stroke: none; opacity: 0.18; }",
        ".chart .name { stroke: none; }",
        *(
            f".c{i} {{ stroke: var(--c{i}); }} .dot.c{i}, .band.c{i}, .chart .name.c{i} "
            f"{{ fill: var(--c{i}); }}"
            for i in range(8)
        ),
        ".charts { display: grid; gap: 14px; }",
        ".charts { grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }",
        ".wide { overflow-x: auto; } td, th { padding: 3px 10px; text-align: right; }",
        "td:first-child, th:first-child { text-align: left; }",
    ]
)
AXES = (
    ("train_flops", "FLOPs of training, executed"),
    ("bytes_per_token", "bytes sent per token"),
    ("memory_bytes", "bytes of memory of a step"),
    ("cpu_seconds", "CPU seconds of training"),
)
"""What the Pareto plots have on their horizontal axes."""


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page to a file and return its path. Raises UsageError where that is impossible."""
    return write_html(render_comparison(comparison), path)


def render_comparison(comparison: Comparison) -> str:
    """Return the page as HTML."""
    title = "Headway: " + ", ".join(arm.name for arm in comparison.arms)
    budget = comparison.experiment.budget
    lead = (
        f"Validation bits per byte after a budget of {budget} for {comparison.baseline}; "
        f"{len(comparison.experiment.seeds)} seeds, the same for all arms. Differences are paired "
        "by seed; below 0 the arm is better."
    )
    sections = [
        ("Arms", _arms(comparison)),
        (f"Differences to {comparison.baseline}, bits/byte", _forest(comparison)),
        ("Curves", _curves(comparison)),
        ("Quality and cost", _pareto(comparison)),
        ("Runs", _rows(comparison)),
    ]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    body += [f"<h2>{escape(name)}</h2>\n{html}" for name, html in sections if html]
    return static_page(title, "\n".join(body), STYLE)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as HTML; its cells are escaped."""

    def cells(values: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(v))}</{tag}>" for v in values) + "</tr>"

    body = "\n".join(cells(row, "td") for row in rows)
    return f'<div class="wide"><table>\n{cells(head, "th")}\n{body}\n</table></div>'


def _arms(comparison: Comparison) -> str:
    rows = []
    for arm in comparison.arms:
        costs = arm.costs
        solved = ", ".join(f"{f.rpartition('.')[2]} {v}" for f, v in arm.solved.items())
        off = ", ".join(f"{q} {v:+.2%}" for q, v in arm.mismatch.items())
        rows.append(
            (
                arm.name,
                f"{_mean(list(comparison.bits(arm.name).values())):.4f}",
                *(f"{costs[n]:,.0f}" for n in ("active_parameters", "total_parameters")),
                *(f"{costs[n]:,.0f}" for n in ("flops_per_token", "bytes_per_token")),
                f"{costs['memory_bytes'] / 2**20:,.1f}",
                f"{arm.tokens:,}",
                solved or "as given",
                off,
            )
        )
    head = "arm, bits/byte, active, total, FLOPs/token, bytes/token, MiB, tokens, solved, mismatch"
    return table(head.split(", "), rows)


def _forest(comparison: Comparison) -> str:
    base, rows = comparison.bits(comparison.baseline), []
    for row in comparison.differences:
        bits = comparison.bits(row["arm"])
        single = [bits[seed] - base[seed] for seed in bits if seed in base]
        spans = [(s[0], s[1]) for s in (row["ci95"], row["ci95_documents"]) if s]
        rows.append((row["arm"], row["mean"], spans, single))
    note = (
        '<p class="about">Thick: 95% interval over seeds (Student\'s t). Thin: over seeds and '
        "validation documents. Small dots: seeds.</p>"
    )
    x_label = f"bits/byte above {comparison.baseline}"
    return svg.forest(rows, x_label) + note if rows else ""


def _curves(comparison: Comparison) -> str:
    """Return validation bits per byte over tokens: each seed thin, the mean of an arm thick."""
    marks = []
    for colour, arm in enumerate(comparison.arms):
        by_tokens: dict[float, list[float]] = {}
        for row in (r for r in comparison.rows if r["arm"] == arm.name):
            folder = comparison.root / "runs" / row["config_hash"]
            records = read_metrics(folder / "metrics.jsonl")
            points = [
                (float(r["tokens"]), float(r["val_bits_per_byte"]))
                for r in records
                if r["step"] and math.isfinite(r.get("val_bits_per_byte") or math.nan)
            ]
            for tokens, bits in points:
                by_tokens.setdefault(tokens, []).append(bits)
            marks.append(svg.Mark(points, colour, f"{arm.name}, seed {row['seed']}", thin=True))
        mean = [(tokens, _mean(bits)) for tokens, bits in sorted(by_tokens.items())]
        marks.append(svg.Mark(mean, colour, arm.name, label=arm.name))
    return svg.xy_chart(marks, "training tokens", "validation bits/byte")


def _pareto(comparison: Comparison) -> str:
    charts = []
    for name, label in AXES:
        marks = []
        for colour, arm in enumerate(comparison.arms):
            bits = list(comparison.bits(arm.name).values())
            rows = [r for r in comparison.rows if r["arm"] == arm.name]
            costs = {**arm.costs, "train_flops": arm.train_flops}
            value = costs[name] if name in costs else _mean([r[name] for r in rows])
            if bits and math.isfinite(value):
                point = [(value, _mean(bits))]
                marks.append(svg.Mark(point, colour, arm.name, dots=True, label=arm.name))
        charts.append(svg.xy_chart(marks, label, "bits/byte"))
    return f'<div class="charts">{"".join(charts)}</div>'


def _rows(comparison: Comparison) -> str:
    rows = [
        (
            row["arm"],
            row["seed"],
            "diverged" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
            f"{row['tokens']:,}",
            f"{row['train_flops']:.4g}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            row["config_hash"],
        )
        for row in comparison.rows
    ]
    head = "arm, seed, bits/byte, tokens, FLOPs, CPU s, tokens/s, folder"
    return table(head.split(", "), rows)
