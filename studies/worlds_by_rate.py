"""Which designs solve which synthetic worlds, each at the best of four rates?

The worlds and designs of the study `worlds`, with three seeds, longer runs and rates that are
octaves apart: where one rate is given to all, a design may fail by its rate alone."""

from collections.abc import Sequence
from statistics import mean

from headway.lab.experiment import Arm
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Rule, Series, Study
from studies.best_rates import RATES, best, name, shares, table
from studies.world_arms import SMALL, SOLVED, arm, series, wrong
from studies.worlds import DESIGNS, WORLDS

SEEDS = (101, 102, 103)
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


def sparse_solves(rows: Sequence[Row]) -> Verdict:
    behind = {
        f"{d} on {w}": best(rows, w, d).solved - best(rows, w, "dense").solved
        for w in WORLDS
        for d in DESIGNS[1:]
    }
    worst = min(behind, key=lambda at: behind[at])
    answer = {0: "holds", -1: "cannot_tell"}.get(min(behind[worst], 0), "refuted")
    return Verdict(answer, f"Worst is {worst}: {behind[worst]:+d} solved seeds beside dense.")


def heads_recall(rows: Sequence[Row]) -> Verdict:
    heads, dense = (best(rows, "recall", design) for design in ("2x32", "dense"))
    more = heads.solved - dense.solved
    answer = "holds" if more >= 2 else "refuted" if more <= 0 else "cannot_tell"
    flat = best(rows, "recall", "flat").solved
    return Verdict(answer, f"Solved: 2x32 {heads.solved}, flat {flat}, dense {dense.solved} of 3.")


def no_design(rows: Sequence[Row]) -> Verdict:
    reached = {design: best(rows, "s5", design) for design in DESIGNS}
    solved = sum(one.solved for one in reached.values())
    text = ", ".join(f"{design} {one.wrong:.0%}" for design, one in reached.items())
    hard = min(one.wrong for one in reached.values()) >= 0.5
    answer = "refuted" if solved else "holds" if hard else "cannot_tell"
    return Verdict(answer, f"Targets wrong: {text}.")


def rate_decides(rows: Sequence[Row]) -> Verdict:
    """Compare how far rates and designs lie apart, on the worlds that some run solves."""
    apart = dict[str, tuple[float, float]]()
    for world in WORLDS:
        reached = [best(rows, world, design) for design in DESIGNS]
        if any(one.solved for one in reached):
            wrongs = [[mean(shares(rows, world, d, r)) for r in RATES] for d in DESIGNS]
            of_rates = mean(max(line) - min(line) for line in wrongs)
            of_designs = max(one.wrong for one in reached) - min(one.wrong for one in reached)
            apart[world] = of_rates, of_designs
    larger = [a > b for a, b in apart.values()]
    answer = "holds" if all(larger) else "cannot_tell" if any(larger) else "refuted"
    text = "; ".join(f"{w} {a:.3f} by rate, {b:.3f} by design" for w, (a, b) in apart.items())
    return Verdict(answer if apart else "cannot_tell", f"{text}.")


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
            "An octave or two of the rate change more than the design does.",
            NO_SOURCE,
            "Targets wrong, on each world that some run solves: holds if best and worst rate lie "
            "further apart (mean over designs) than the best and the worst design at their best "
            "rates, on all these worlds; refuted if on none.",
            rate_decides,
        ),
        Rule(
            "s5",
            "Two layers of attention do not learn products of eight permutations of five, "
            "whatever the feed-forward layer and the rate.",
            "arXiv 2404.08819: constant depth cannot for all lengths",
            "Holds if no run solves it and each design has half of the targets wrong or more; "
            "refuted if a run solves it.",
            no_design,
            ("s5",),
        ),
    ),
    scores=wrong,
    notes=f"Two layers of width 64 in float32; solved: less than {SOLVED:.0%} of the targets of "
    "512 new items wrong. The best of four rates is chosen by the same seeds that are counted, "
    "for all designs alike.",
    tables={"solved seeds of three, by rate": table},
)
