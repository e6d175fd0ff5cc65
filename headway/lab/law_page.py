"""The page of a law: its curve with the interval, the runs, and what the top rungs said."""

from html import escape
from pathlib import Path

import numpy as np

from headway.lab import svg
from headway.lab.forecast import Fit
from headway.lab.isoflop import minima
from headway.lab.page import STYLE, table
from headway.lab.rungs import Runs
from headway.report.html import static_page, write_html

BEYOND = 1000.0
"""How far beyond the largest run the curve is drawn."""
POINTS = 60


def write_law(fit: Fit, runs: Runs, path: Path) -> Path:
    """Write the page to a file and return its path. Raises UsageError where that is impossible."""
    return write_html(render_law(fit, runs), path)


def render_law(fit: Fit, runs: Runs) -> str:
    """Return the page as HTML."""
    facts, law = fit.facts, fit.law
    title = f"Headway: {law.form} law of {facts.source}"
    lead = (
        f"{facts.runs} runs on {facts.rungs} rungs, irreducible loss {law.irreducible}. The "
        f"band is the {facts.level:.0%} interval of a run."
    )
    sections = [
        ("Loss", _curve(fit, runs) if "flops" in runs.x else _measured(fit, runs)),
        ("Budgets", _budgets(runs) if runs.form == "isoflop" else ""),
        ("Parameters", _parameters(fit)),
        ("Without the top rungs", _backtest(fit)),
    ]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    body += [f"<h2>{name}</h2>\n{html}" for name, html in sections if html]
    body += [f'<p class="about">{escape(note)}</p>' for note in facts.notes]
    return static_page(title, "\n".join(body), STYLE)


def _curve(fit: Fit, runs: Runs) -> str:
    """Return loss over FLOPs, with the interval, beyond the largest run."""
    flops = runs.x["flops"]
    x = {"flops": np.geomspace(flops.min() / 2, flops.max() * BEYOND, POINTS)}
    draws = fit.law.draws(x) + fit.seed_noise_R[:, None]
    tail = (1 - fit.facts.level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    edge = [*zip(x["flops"], low, strict=True), *zip(x["flops"][::-1], high[::-1], strict=True)]
    marks = [
        svg.Mark(edge, 0, "interval", band=True),
        svg.Mark([*zip(x["flops"], fit.law.loss(x), strict=True)], 0, "law"),
    ]
    for i, (name, law) in enumerate(fit.others):
        loss_P = law.loss(x)
        text, below = f"irreducible {name}", bool(loss_P[-1] < fit.law.loss(x)[-1])
        points = [*zip(x["flops"], loss_P, strict=True)]
        label = "" if name == "free" else text  # it lies among the others
        marks.append(svg.Mark(points, i + 2, text, thin=True, label=label, below=below))
    marks += [
        svg.Mark([(c, loss)], 1, f"{c:.3g} FLOPs: {loss:.4f}", dots=True)
        for c, loss in _points(runs)
    ]
    return svg.xy_chart(marks, "FLOPs", "loss", log_x=True)


def _points(runs: Runs) -> list[tuple[float, float]]:
    """Return what the law is fitted to: runs, or the minima of budgets."""
    if runs.form == "isoflop":
        vertices = minima(runs.x["flops"], runs.x["tokens"], runs.loss_N)
        return [*zip(vertices.budget_B, vertices.loss_B, strict=True)]
    return [*zip(runs.x["flops"], runs.loss_N, strict=True)]


def _measured(fit: Fit, runs: Runs) -> str:
    """Return measured over predicted losses, and by how much they differ over compute."""
    predicted = fit.law.loss(runs.x)
    ends = [float(min(predicted.min(), runs.loss_N.min())), float(runs.loss_N.max())]
    pairs = [*zip(predicted, runs.loss_N, strict=True)]
    off = [*zip(runs.compute_N, (runs.loss_N / predicted - 1) * 100, strict=True)]
    equal = svg.Mark([(v, v) for v in ends], 0, "equal", thin=True)
    charts = (
        svg.xy_chart([equal, svg.Mark(pairs, 1, "run", dots=True)], "law", "measured loss"),
        svg.xy_chart(
            [svg.Mark(off, 1, "run", dots=True)], "FLOPs (6·N·D)", "%, measured − law", log_x=True
        ),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def _budgets(runs: Runs) -> str:
    """Return loss over tokens, a parabola for each budget."""
    vertices = minima(runs.x["flops"], runs.x["tokens"], runs.loss_N)
    marks = []
    for i, budget in enumerate(vertices.budget_B):
        at = runs.x["flops"] == budget
        tokens = runs.x["tokens"][at]
        x = np.geomspace(tokens.min(), tokens.max(), POINTS)
        curve = [*zip(x, np.polyval(vertices.parabola_B3[i], np.log(x)), strict=True)]
        name = f"{budget:.3g}"
        marks.append(svg.Mark(curve, i, name, label=name))
        marks.append(svg.Mark([*zip(tokens, runs.loss_N[at], strict=True)], i, name, dots=True))
        best = [(vertices.tokens_B[i], vertices.loss_B[i])]
        marks.append(svg.Mark(best, i, f"{name}: least at {vertices.tokens_B[i]:.3g}", dots=True))
    return svg.xy_chart(marks, "tokens", "loss", log_x=True)


def _parameters(fit: Fit) -> str:
    value = fit.to_dict()
    rows = [
        (name, f"{number:.5g}", *(f"{v:.5g}" for v in value["intervals"][name]))
        for name, number in value["parameters"].items()
    ]
    return table(("parameter", "value", "low", "high"), rows)


def _backtest(fit: Fit) -> str:
    rows = [
        (
            f"top {row.dropped_rungs}",
            row.runs,
            f"{row.mean_error:+.2%}",
            f"{row.largest_error:+.2%}",
            f"{row.inside} of {row.runs}",
        )
        for row in fit.facts.backtest
    ]
    head = ("rungs left out", "runs", "mean error", "largest", "inside the interval")
    return table(head, rows) if rows else ""
