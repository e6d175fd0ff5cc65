"""How long a law takes, and a Vendi score: CPU seconds of one thread, so that the machine's load
does not matter.

    python bench/laws.py [--runs 200] [--bootstraps 1000] [--documents 10000] [--save] [--json]

`law fit` is everything that the verb does but start Python: the fit from all starts, the bootstrap,
the back-tests, the other irreducible losses, the page. `forecast` is the example of docs/laws.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import add_options, print_rows, report, run, target
from headway.eval.diversity import FEATURES, unit, vendi
from headway.lab.forecast import fit_runs
from headway.lab.law_page import render_law
from headway.lab.laws import Form, Irreducible
from headway.lab.rungs import read_runs

FORMS: tuple[Form, ...] = ("power", "chinchilla", "granularity", "joint")
NOISE = 0.003
MARIN = (
    (1e18, 3.5273),
    (3e18, 3.3398),
    (1e19, 3.1494),
    (3e19, 3.0066),
    (1e20, 2.8509),
    (3e20, 2.7222),
)
"""Best losses of the ladder of marin-community/marin (experiments/grug/moe/README): FLOPs, Paloma
macro loss."""
MARIN_AT, MARIN_MEASURED = 1e23, 2.234


def runs(n: int) -> dict[str, np.ndarray]:
    """Parameters, tokens and shapes of n runs."""
    rng = np.random.default_rng(0)
    N = 10 ** rng.uniform(7, 9.5, n)
    D = N * 10 ** rng.uniform(0.3, 2.3, n)
    granularity, experts = 2.0 ** rng.integers(0, 5, n), 2.0 ** rng.integers(0, 6, n)
    return {"params": N, "tokens": D, "granularity": granularity, "experts": experts}


def write(path: Path, n: int, form: Form) -> None:
    """Write the losses of published laws, with noise."""
    x = runs(n)
    x["flops"] = 6 * x["params"] * x["tokens"]
    N, D, G, E = (x[name] for name in ("params", "tokens", "granularity", "experts"))
    match form:
        case "chinchilla":
            loss = 1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28
        case "granularity":
            loss = 0.47 + (2.1 * G**-0.58 + 18.1) * N**-0.115 + 30.8 * D**-0.147
        case "joint":
            ln = np.log(E)
            loss = 1.3637 + 35.91 * E**0.2285 * N ** -(0.1889 - 0.0098 * ln)
            loss += 35.98 * E**-0.5529 * D ** -(0.1775 + 0.0259 * ln)
        case _:
            loss = 1.6 + 95.18 * x["flops"] ** -0.0941
    x["loss"] = loss * np.exp(NOISE * np.random.default_rng(1).standard_normal(n))
    columns = zip(*(values.tolist() for values in x.values()), strict=True)
    rows = [",".join(x), *(",".join(map(repr, row)) for row in columns)]
    path.write_text("\n".join(rows) + "\n", "utf-8")


def law_row(form: Form, n: int, bootstraps: int) -> dict:
    """Time one fit with its page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        write(path, n, form)
        begin = time.process_time()
        table = read_runs(path, form)
        fit = fit_runs(table, Irreducible(None), bootstraps=bootstraps)
        render_law(fit, table)
        seconds = time.process_time() - begin
    row = {"what": "law fit", "form": form, "runs": n, "bootstraps": bootstraps}
    return row | {"cpu_seconds": seconds}


def forecast_row(irreducible: str) -> dict:
    """Forecast Marin's run of 1e23 from its ladder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marin.csv"
        path.write_text("\n".join(["flops,loss", *(f"{c!r},{y!r}" for c, y in MARIN)]) + "\n")
        fit = fit_runs(read_runs(path, "power"), Irreducible.parse(irreducible))
    forecast = fit.predict({"flops": MARIN_AT})
    row = {"what": "forecast", "irreducible": irreducible, "flops": MARIN_AT}
    row |= {"loss": forecast.loss, "low": forecast.low, "high": forecast.high}
    inside = forecast.low <= MARIN_MEASURED <= forecast.high
    return row | {"level": forecast.level, "measured": MARIN_MEASURED, "inside": inside}


def vendi_row(n: int) -> dict:
    """Time one Vendi score."""
    x_ND = unit(np.random.default_rng(0).standard_normal((n, FEATURES)))
    begin = time.process_time()
    score = vendi(x_ND)
    row = {"what": "vendi", "documents": n, "features": FEATURES, "score": score}
    return row | {"cpu_seconds": time.process_time() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--bootstraps", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=10_000)
    add_options(parser, data=False)
    args = parser.parse_args()
    rows = [law_row(form, args.runs, args.bootstraps) for form in FORMS]
    slowest = max(row["cpu_seconds"] for row in rows)
    rows.append(vendi_row(args.documents))
    targets = [
        target("law fit, slowest form, CPU seconds", slowest, 10.0, at_least=False),
        target("Vendi score, CPU seconds", rows[-1]["cpu_seconds"], 5.0, at_least=False),
    ]
    rows += [forecast_row(irreducible) for irreducible in ("1.6", "free", "1.6±0.2")]
    print_rows(rows)
    report("laws", rows, targets, args)


if __name__ == "__main__":
    run(main)
