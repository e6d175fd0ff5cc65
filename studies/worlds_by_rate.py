"""Which designs solve which synthetic worlds, each at the best of four rates?

The worlds and designs of the study `worlds`, with three seeds, longer runs and rates that are
octaves apart: where one rate is given to all, a design may fail by its rate alone."""

from collections.abc import Sequence

from headway.lab.experiment import Arm
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.statistics import t_interval
from headway.lab.study import Rule, Series, Study
from studies.best_rates import RATES, apart, best, name, table
from studies.world_arms import SMALL, SOLVED, arm, series, wrong
from studies.worlds import DESIGNS, WORLDS

SEEDS = (201, 202, 203)
STEPS = {"recall": 1500, "facts": 1000, "s5": 1000, "parity": 1000}
"""Of the dense arm; others have its FLOPs."""
LR, MUON_LR = 3e-3, SMALL["optim.muon_lr"]


def at_rate(design: str, world: str, rate: float) -> Arm:
    """Return a design on a world at so many times the usual rates."""
    rates = {"optim__lr": LR * rate, "optim__muon_lr": MUON_LR * rate}
    return arm(name(design, rate), WORLDS[world], design, run__dtype="float32", **rates)


def runs(world: str) -> Series:
    arms = tuple(at_rate(design, world, rate) for rate in RATES for design in DESIGNS)
    return series(world, arms, SEEDS, STEPS[world])


def reached(rows: Sequence[Row], world: str, design: str) -> int:
    """Return how many seeds a design solves at its best rate, none where runs diverged at each."""
    one = best(rows, world, design)
    return one.solved if one else 0


def sparse_solves(rows: Sequence[Row]) -> Verdict:
    behind = {
        f"{d} on {w}": reached(rows, w, d) - reached(rows, w, "dense")
        for w in WORLDS
        for d in DESIGNS[1:]
    }
    worst = min(behind, key=lambda at: behind[at])
    answer = {0: "holds", -1: "cannot_tell"}.get(min(behind[worst], 0), "refuted")
    return Verdict(answer, f"Worst is {worst}: {behind[worst]:+d} solved seeds beside dense.")


def heads_recall(rows: Sequence[Row]) -> Verdict:
    solved = {design: reached(rows, "recall", design) for design in DESIGNS}
    more = solved["2x32"] - solved["dense"]
    answer = "holds" if more >= 2 else "refuted" if more <= 0 else "cannot_tell"
    return Verdict(answer, f"Solved: {', '.join(f'{d} {n}' for d, n in solved.items())} of 3.")


def no_design(rows: Sequence[Row]) -> Verdict:
    wrongs = [row["scores"]["targets wrong"] for row in rows if row["scores"]]
    solved = sum(x < SOLVED for x in wrongs)
    answer = "refuted" if solved else "holds" if min(wrongs) >= 0.5 else "cannot_tell"
    return Verdict(answer, f"{solved} runs solve it; the best one has {min(wrongs):.0%} wrong.")


def rate_decides(rows: Sequence[Row]) -> Verdict:
    solved = [w for w in WORLDS if any(reached(rows, w, design) for design in DESIGNS)]
    if not solved:
        return Verdict("cannot_tell", "No design solves a world.")
    spans = {world: t_interval(apart(rows, world)) for world in solved}
    text = "; ".join(f"{w} {span.low:+.3f} … {span.high:+.3f}" for w, span in spans.items())
    all_above, all_below = (
        all(edge > 0 for edge in edges)
        for edges in ([s.low for s in spans.values()], [-s.high for s in spans.values()])
    )
    answer = "holds" if all_above else "refuted" if all_below else "cannot_tell"
    return Verdict(answer, f"Range over rates less that over designs, 95%: {text}.")


NO_SOURCE = "none: expected"
STUDY = Study(
    "worlds_by_rate",
    "Which designs solve which synthetic worlds, each at its best rate?",
    tuple(map(runs, WORLDS)),
    rules=(
        Rule(
            "sparse",
            "Sparse layers of equal FLOPs solve what a dense one solves.",
            NO_SOURCE,
            "Holds if no sparse design solves fewer seeds of a world than dense, refuted if one "
            "solves two fewer.",
            sparse_solves,
        ),
        Rule(
            "recall",
            "Multi-Head LatentMoE solves recall with more seeds than a dense layer.",
            "the study `worlds`: 2 of 2 seeds, dense none, flat one",
            "Holds if it does with two seeds more, refuted if with none more.",
            heads_recall,
            ("recall",),
        ),
        Rule(
            "rate",
            "Two octaves of the rate change more than three designs do.",
            NO_SOURCE,
            "On each world that a design solves: the range of the targets wrong over the rates "
            "0.5, 1 and 2 (mean over designs), less that over the designs (mean over these rates). "
            "Holds if the 95% interval over seeds is above 0 on all, refuted if below on all.",
            rate_decides,
        ),
        Rule(
            "s5",
            "Two layers of attention do not learn products of eight permutations of five, "
            "whatever the feed-forward layer and the rate.",
            "arXiv 2404.08819: constant depth cannot for all lengths",
            "Holds if each run has half of the targets wrong or more, refuted if one solves it.",
            no_design,
            ("s5",),
        ),
    ),
    scores=wrong,
    notes=f"Two layers of width 64 in float32; solved: less than {SOLVED:.0%} of the targets of "
    "512 new items wrong. The best of four rates is chosen by the same seeds that are counted, "
    "for all designs alike.",
    tables={"solved seeds, by rate": table},
)
