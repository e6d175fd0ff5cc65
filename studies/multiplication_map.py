"""Which products does a small model learn: digits at once, the last one first, with a scratch-pad,
or with a layer applied twice; dense, and with 8 and 32 experts?

One model of two layers of width 64 for all sizes from one digit by one to four by four. The study
`multiplication` asked it of single sizes, for half of the steps."""

from collections.abc import Sequence
from functools import partial
from statistics import mean

from headway.lab import svg
from headway.lab.experiment import Arm
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Rule, Series, Study
from studies import products
from studies.multiplication import looped
from studies.products import DIGITS, FORMS, PLACES, Cell, helps, of, of_all, wrong_of
from studies.world_arms import series

DESIGNS = ("dense", "flat", "flat, E 32")
COLUMNS = ("direct", "looped", "last first", "scratch-pad")
SEEDS, STEPS = (101, 102, 103), 2000
MARGIN = 0.05
LARGE = (3, 3), (3, 4), (4, 3), (4, 4)


def runs(form: str) -> Series:
    """Return the designs in a form, and for the direct one those with a layer applied twice."""
    plain = tuple(products.on_all_sizes(design, form) for design in DESIGNS)
    twice = tuple(Arm(f"looped, {arm.name}", arm.config, looped) for arm in plain)
    return series(form, (*plain, *twice) if form == "direct" else plain, SEEDS, STEPS)


def shown(rows: Sequence[Row], *cells: Cell) -> str:
    parts = (
        f"{form}, {design} {mean(map(of_all, of(rows, (form, design)))):.0%}"
        for form, design in cells
    )
    return f"Items wrong, in the mean over sizes: {'; '.join(dict.fromkeys(parts))}."


def direct_fails(rows: Sequence[Row]) -> Verdict:
    wrong = [one[wrong_of(*size)] for one in of(rows, ("direct", "dense")) for size in LARGE]
    answer = "holds" if min(wrong) > 0.9 else "refuted" if max(wrong) < 0.5 else "cannot_tell"
    return Verdict(answer, f"{min(wrong):.0%} to {max(wrong):.0%} of the items are wrong.")


def middle_first(rows: Sequence[Row]) -> Verdict:
    squares = [wrong_of(n, n) for n in DIGITS[1:]]
    dense = of(rows, ("direct", "dense"))
    triples = [
        [one[f"{square}, {place}"] for place in PLACES] for one in dense for square in squares
    ]
    worst = [middle > max(first, last) for first, middle, last in triples]
    answer = "holds" if all(worst) else "cannot_tell" if any(worst) else "refuted"
    first, middle, last = (mean(values) for values in zip(*triples, strict=True))
    return Verdict(answer, f"First {first:.0%} wrong, middle {middle:.0%}, last {last:.0%}.")


def form_helps(form: str, rows: Sequence[Row]) -> Verdict:
    pair = ("direct", "dense"), (form, "dense")
    answers = {"all": "holds", "none": "refuted", "open": "cannot_tell"}
    return Verdict(answers[helps(rows, [pair], MARGIN)], shown(rows, *pair))


def none_helps(pairs: Sequence[tuple[Cell, Cell]], rows: Sequence[Row]) -> Verdict:
    answers = {"none": "holds", "all": "refuted", "some": "refuted", "open": "cannot_tell"}
    answer = answers[helps(rows, pairs, MARGIN)]
    return Verdict(answer, shown(rows, *(cell for pair in pairs for cell in pair)))


def picture(rows: Sequence[Row]) -> str:
    """Return heat maps of items wrong by size, a form and a design each; "" without rows."""
    maps = {
        (design, form): [
            [mean(one[wrong_of(m, n)] for one in scored) for n in DIGITS] for m in DIGITS
        ]
        for design in DESIGNS
        for form in COLUMNS
        if (scored := of([row for row in rows if row["scores"]], (form, design)))
    }
    caption = "% of items wrong, by digits of the first factor (down) and of the second (across)"
    return svg.heat_maps(maps, caption)


def rule(id: str, text: str, says: str, judge, *corpora: str) -> Rule:
    return Rule(id, text, "what small models are said to fail at", says, judge, corpora)


GAIN = "the 95% interval over seeds of the share of items fewer wrong, in the mean over sizes,"
RULES = (
    rule(
        "direct",
        "Written at once, products from three digits by three on are not learned.",
        "Holds if more than 90% of the items of each such size are wrong for each seed, refuted if "
        "under 50% are, everywhere.",
        direct_fails,
        "direct",
    ),
    rule(
        "middle",
        "Middle digits of direct products fail first.",
        "Holds if for each seed, at 2 × 2, 3 × 3 and 4 × 4, a middle digit is wrong more often "
        "than the first and the last one, refuted if for none.",
        middle_first,
        "direct",
    ),
    *(
        rule(
            form,
            text,
            f"Holds if {GAIN} is above {MARGIN:.0%}, refuted if it is below.",
            partial(form_helps, form),
            "direct",
            form,
        )
        for form, text in (
            ("scratch-pad", "A scratch-pad helps."),
            ("last first", "To begin with the last digit helps."),
        )
    ),
    rule(
        "sparsity",
        "Neither 8 nor 32 experts, 2 per token, help in any form, beside dense at equal FLOPs.",
        f"Holds if {GAIN} is below {MARGIN:.0%} for all eight, refuted if one is above.",
        partial(none_helps, [((f, "dense"), (f, d)) for f in COLUMNS for d in DESIGNS[1:]]),
    ),
    rule(
        "looped",
        "One layer applied twice is not better than two layers, in any design.",
        f"Holds if {GAIN} is below {MARGIN:.0%} for all three, refuted if one is above.",
        partial(none_helps, [(("direct", d), ("looped", d)) for d in DESIGNS]),
        "direct",
    ),
)
STUDY = Study(
    "multiplication_map",
    "Which products does a small model learn, in which form, and do experts help?",
    tuple(map(runs, FORMS)),
    rules=RULES,
    scores=products.scores,
    picture=picture,
    notes="Two layers of width 64, float32, 2,000 steps of 64 items, of all 16 sizes alike; "
    "512 test items of each size, of whose factors training has no product in either order (few "
    "are different at the smallest: 1 × 1 has nine). An item is wrong where one token of what is "
    "written is, the scratch-pad's too. `looped` is one layer in both places, by an edit. "
    "Intervals of a rule are not corrected for their number.",
)
