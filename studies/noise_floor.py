"""How large are differences that mean nothing? The instrument of the studies of quality.

Flat MoE and two heads of 64, trained with several seeds: how far a paired difference spreads, and
what of it comes from initial values and from the order of the data; at several budgets, with 4,096
and 8,192 tokens per step, with near-copies kept on one side of the split or
not. No claims: the protocol of the other studies is chosen by it."""

from collections.abc import Sequence
from functools import partial
from statistics import mean, stdev

from headway.lab.experiment import Arm
from headway.lab.rows import Row
from headway.lab.study import Study
from headway.model.init import init_weights
from headway.model.transformer import Transformer
from studies.arms import WHERE, flat, heads, series

BUDGETS = (250, 500, 1000)
SEEDS = (0, 1, 2, 3)


def redraw(seed: int, model: Transformer) -> None:
    """Give a model the initial values of another seed."""
    config = model.config
    init_weights(model, n_layers=config.n_layers, embed_std=config.init_std, seed=seed)


def pair(corpus: str) -> tuple[Arm, Arm]:
    """Return flat MoE and two heads of 64."""
    return flat(corpus), heads(corpus, 2)


INITS = tuple(
    flat("python", f"flat, initial values of seed {k}", partial(redraw, k)) for k in (1, 2, 3)
)
ORDERS = flat("python", "flat, initial values of seed 0", partial(redraw, 0))


def spread(rows: Sequence[Row]) -> list[Row]:
    """Return the deviation of a run and of a difference, and what each source of noise adds."""
    table: list[Row] = []
    for corpus, steps in sorted({(r["corpus"], r["budget"]) for r in rows}):
        group = [r for r in rows if (r["corpus"], r["budget"]) == (corpus, steps)]
        bits = {
            measure: {(r["arm"], r["seed"]): r[measure] for r in group if r[measure] is not None}
            for measure in ("bits_per_byte", "bits_per_byte_uncopied")
        }
        minutes = mean(r["cpu_seconds"] for r in group) / 60
        whats = {
            "2x64 − flat, pairs": _pairs,
            "2x64 − flat, mean": _mean,
            "2x64 − flat, seeds mixed": _mixed,
            "flat": partial(_of_arm, "flat"),
            "2x64": partial(_of_arm, "2x64"),
            "flat, other initial values": _initial_values,
            "flat, other order of the data": _orders,
        }
        for what, values in whats.items():
            cells = [values(bits[measure]) for measure in bits]
            if cells[0][0] is not None:
                table.append(
                    {
                        "text": corpus,
                        "steps": steps,
                        "what": what,
                        "n": cells[0][1],
                        "bits/byte": _decimals(cells[0][0]),
                        "without copied targets": _decimals(cells[1][0]),
                        "CPU minutes of a run": f"{minutes:.1f}",
                    }
                )
    return table


def _decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


Bits = dict[tuple[str, int], float]
Cell = tuple[float | None, int]
"""A deviation (or a mean) and the number of values."""


def _spread(values: list[float]) -> Cell:
    return (stdev(values) if len(values) > 1 else None), len(values)


def _differences(bits: Bits) -> list[float]:
    seeds = [seed for arm, seed in bits if arm == "flat" and ("2x64", seed) in bits]
    return [bits["2x64", seed] - bits["flat", seed] for seed in seeds]


def _pairs(bits: Bits) -> Cell:
    return _spread(_differences(bits))


def _mean(bits: Bits) -> Cell:
    values = _differences(bits)
    return (mean(values) if values else None), len(values)


def _mixed(bits: Bits) -> Cell:
    """Return the deviation of differences of unequal seeds: what pairing is for."""
    flat, two = ({s: b for (arm, s), b in bits.items() if arm == name} for name in ("flat", "2x64"))
    return _spread([two[i] - flat[j] for i in two for j in flat if i != j])


def _of_arm(name: str, bits: Bits) -> Cell:
    return _spread([b for (arm, _), b in bits.items() if arm == name])


def _initial_values(bits: Bits) -> Cell:
    """Return the deviation over initial values, the order of the data being that of seed 0."""
    arms = {"flat", *(arm.name for arm in INITS)}
    return _of_these([b for (arm, seed), b in bits.items() if arm in arms and seed == 0])


def _orders(bits: Bits) -> Cell:
    """Return the deviation over orders of the data, the initial values being those of seed 0."""
    values = [b for (arm, _), b in bits.items() if arm == ORDERS.name]
    return _of_these([*values, *([bits["flat", 0]] if ("flat", 0) in bits else [])])


def _of_these(values: list[float]) -> Cell:
    return _spread(values) if len(values) > 1 else (None, 0)


STUDY = Study(
    "noise_floor",
    "How large are differences that mean nothing?",
    (
        series("screen", "python", pair("python"), SEEDS, BUDGETS),
        series("screen", "python", pair("python"), SEEDS, (2000,)),
        series("screen", "python, 8k", pair("python, 8k"), SEEDS, (250,)),
        series("screen", "python", INITS, (0,), BUDGETS),
        series("screen", "python", (ORDERS,), (1, 2, 3), BUDGETS),
        *(
            series("screen", corpus, pair(corpus), SEEDS, (250,))
            for corpus in ("python, near-copies split",)
        ),
    ),
    notes=f"{WHERE} Standard deviations over seeds, but where it says mean. `python, 8k`: 8,192 "
    "bytes per step. `near-copies split`: files that are nearly the same may be on both sides.",
    tables={"deviations": spread},
)
