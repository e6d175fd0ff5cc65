"""Does a law of cheap runs forecast the loss of a dearer one, at 100 times the compute of `ladder`?

Four widths at each of four budgets, 1e13 … 1.25e14 executed FLOPs, sixty CPU minutes; the runs of a
width branch off one trunk. The forecast of the top rung, 3e14, is registered before its run, of
twenty minutes, as in `ladder`, by `python -m studies.ladder_large`."""

from collections.abc import Sequence
from pathlib import Path

from headway.config import UsageError
from headway.lab.experiment import Arm
from headway.lab.forecast import Fit
from headway.lab.forecast_file import check_run, score
from headway.lab.measurement import Verdict
from headway.lab.rows import Row, read_rows
from headway.lab.rungs import Runs
from headway.lab.study import Rule, Study
from studies import ladder_law
from studies.ladder_law import EXPERTS, by_chinchilla, fit, gained, planned, register_top, within

ROOT = Path(__file__).resolve().parents[1]
FORECAST = ROOT / "studies" / "registered" / "ladder_large_forecast.json"
BASE = "D 96"
BUDGETS, TOP_BUDGET = (1400, 3000, 6800, 17000), 41000
"""In steps of width 96."""
TOP: tuple[int, int] | None = (160, 16018)
"""Width and steps of the top rung; None before there is a forecast."""
MORE = 64
ERROR = 0.01


def arm(width: int, n_experts: int = EXPERTS) -> Arm:
    """Return a mixture of `ladder` in steps of 4,096 tokens, its experts trained by AdamW."""
    fields = {"data__batch_size": 32, "optim__warmup_steps": 100, "optim__muon_experts": False}
    return ladder_law.arm(width, n_experts, 32, **fields)


PLAIN, CHANGED = arm(96), arm(96, MORE)
LADDER = (
    ladder_law.series((PLAIN, arm(128)), BUDGETS),
    ladder_law.series((PLAIN, arm(48)), BUDGETS[:2]),
    ladder_law.series((PLAIN, arm(64)), BUDGETS[:3]),
    ladder_law.series((PLAIN, arm(160)), BUDGETS[2:]),
    ladder_law.series((PLAIN, arm(192)), BUDGETS[3:]),
)


def of_ladder(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that the law is fitted to."""
    return within(rows, LADDER, BUDGETS)


def law(rows: Sequence[Row]) -> tuple[Fit, Runs]:
    """Return the law of the ladder and its runs. Raises UsageError where they give none."""
    return fit(of_ladder(rows), BASE, BUDGETS)


def judge_forecast(rows: Sequence[Row]) -> Verdict:
    """Score the registered forecast by the run above the ladder."""
    top = next((row for row in rows if row["budget"] > max(BUDGETS)), None)
    if top is None or top["bits_per_byte"] is None:
        return Verdict("open", "no run of the top rung has ended")
    check_run(FORECAST, top["arm"], {"flops": top["train_flops"], "tokens": top["tokens"]})
    said = score(FORECAST, top["bits_per_byte"])
    holds = said.inside and abs(said.error) <= ERROR
    return Verdict("holds" if holds else "refuted", said.sentence() + ".")


def top_rung(rows: Sequence[Row]) -> list[Row]:
    """Return the run above the ladder."""
    name, steps = (f"D {TOP[0]}", TOP[1]) if TOP else ("", 0)
    return [row for row in rows if (row["arm"], row["budget"]) == (name, steps)]


def judge_top(rows: Sequence[Row]) -> Verdict:
    """Judge by `judge_forecast`, with the budget of the top rung in steps of width 96."""
    return judge_forecast([row | {"budget": TOP_BUDGET} for row in top_rung(rows)])


def judge_gain(rows: Sequence[Row]) -> Verdict:
    """Say whether more experts gain at every rung, beyond the interval."""
    try:
        said = gained(law(rows)[0], rows, CHANGED.name, PLAIN.name)
    except UsageError as error:
        return Verdict("cannot_tell", f"{error}.")
    refuted = said.sure and said.verdict in ("loses", "not transferable")
    answer = "holds" if said.verdict == "gains" else "refuted" if refuted else "cannot_tell"
    return Verdict(answer, "; ".join(said.sentences()) + ".")


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return the minimum of each budget, once the ladder is whole."""
    return ladder_law.summary(of_ladder(rows), BASE, BUDGETS)


def afterwards(rows: Sequence[Row]) -> list[Row]:
    """Return what another form of law says of the top rung."""
    return [by_chinchilla(of_ladder(rows), row, arm) for row in top_rung(rows)]


def forecast() -> None:
    """Register the forecast of the top rung."""
    fitted, _ = law(read_rows(ROOT / "docs" / "numbers" / "studies" / "ladder_large.json"))
    print("\n".join(fitted.sentences()))
    flops = planned(PLAIN, TOP_BUDGET).train_flops
    steps = {width: planned(arm(width), 1) for width in range(96, 257, 16)}
    print(f"{FORECAST}; TOP = {register_top(fitted, flops, steps, FORECAST)}")


STUDY = Study(
    "ladder_large",
    "Does a law of cheap runs forecast the loss of a dearer one, at a hundred times the compute?",
    (
        *LADDER,
        ladder_law.series((PLAIN, CHANGED), BUDGETS[:3]),
        *(() if TOP is None else (ladder_law.series((arm(TOP[0]),), (TOP[1],)),)),
    ),
    rules=(
        Rule(
            "forecast",
            "the law of four budgets forecasts the run of 2.4 times the largest",
            "Marin's ladder",
            "Holds if the measured bits per byte are within 1% of the registered forecast and "
            "inside its 90% interval; refuted if not.",
            judge_forecast,
        ),
        Rule("top", "`forecast`, by the run of the top rung", "", "As `forecast`.", judge_top),
        Rule(
            "gain",
            f"{MORE} experts gain over {EXPERTS} at every rung",
            "arXiv 2605.11689: loss falls with the number of experts",
            "Holds if the 90% interval of the efficiency gain is above 1 at all three rungs; "
            "refuted if it is below 1 at all, or below at one and above at another (not "
            "transferable).",
            judge_gain,
        ),
    ),
    notes="One seed, models of two layers, experts trained by AdamW. The exponent of the gain is "
    "that of the minima, its losses are those of width 96. The irreducible loss is fitted. The "
    "function that is registered for `forecast` takes a run of more than 17,000 steps for the top "
    "rung, which has 16,018, of a wider model: it stays open. `top` is the same rule on that run. "
    "After a rebase 84f5014, of the forecast, is e9d465e, and 4f9cd22, of that run, 7c7a8c6.",
    tables={
        "Minima": summary,
        "A Chinchilla law of the sixteen runs, made afterwards (exploratory)": afterwards,
    },
)

if __name__ == "__main__":
    forecast()
