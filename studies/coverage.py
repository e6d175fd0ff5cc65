"""What does a model cover in a language that is 0, 0.1, 1 or 10% of its training?

pass@k is the chance that one of k samples is right, Cover@τ the share of problems of which at least
a share τ of the samples is: guessing raises the first with k, and not the second. Texts: `words
(a)`, sums in five languages that differ in their words alone, of which a has most; `order (a)`, in
word order too; `help (de)`, pages of help in five natural languages, of which de has most."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean

from headway.config import Config
from headway.lab.experiment import Arm, Experiment
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Rule, Series, Study
from headway.train.budget import Budget
from studies.mixed_languages import (
    ORDERS,
    PAGES,
    SHARES,
    WORDS,
    by_language,
    by_text,
    of,
    said,
    scores,
    sums,
    texts,
)

SOURCE = "none: proposed after arXiv 2512.07783 (rare contexts of pre-training)"
GUESS = 1 - (1 - 5**-5) ** 256
"""pass@256 of digits at random."""


def unseen(rows: Sequence[Row]) -> Verdict:
    values, anyhow = of(rows, "pass@256, 0%"), of(rows, "pass@256 in any, 0%")
    answer = "holds" if max(values) == 0 else "refuted" if min(values) > 0.01 else "cannot_tell"
    return Verdict(answer, f"pass@256: {said(values)}; answered in any language {said(anyhow)}.")


def one_percent(rows: Sequence[Row]) -> Verdict:
    most = of(rows, "pass@256, 88.9%")
    ratios = [a / max(b, 1e-9) for a, b in zip(of(rows, "pass@256, 1%"), most, strict=True)]
    if min(most) < 0.9:
        return Verdict("cannot_tell", f"A run has not learned its first language: {said(most)}.")
    recovers, not_half = min(ratios) >= 0.9, max(ratios) < 0.5
    covers = of(rows, "cover@0.5, 1%")
    return Verdict(
        "holds" if recovers else "refuted" if not_half else "cannot_tell",
        f"pass@256 at 1% over that of the first language: {said(ratios)}; Cover@0.5 {said(covers)}"
        f"; at 10% pass@256 is {said(of(rows, 'pass@256, 10%'))}.",
    )


def guessing(rows: Sequence[Row]) -> Verdict:
    passed, covers = of(rows, "pass@256, 0.1%"), of(rows, "cover@0.5, 0.1%")
    holds = mean(passed) > GUESS / 2 and max(covers) == 0
    answer = "holds" if holds else "refuted" if mean(passed) < GUESS / 4 else "cannot_tell"
    why = f"pass@256 {said(passed)} where guessing has {GUESS:.2f}; Cover@0.5 {said(covers)}."
    return Verdict(answer, why)


def falls(rows: Sequence[Row]) -> Verdict:
    table = [[row[share] for share in reversed(SHARES)] for row in by_language(rows)]
    ordered = [all(a > b for a, b in pairwise(losses)) for losses in table]
    means = [mean(column) for column in zip(*table, strict=True)]
    refuted = any(a <= b for a, b in pairwise(means))
    answer = "holds" if all(ordered) else "refuted" if refuted else "cannot_tell"
    words = ", ".join(f"{bits:.3f}" for bits in means)
    return Verdict(answer, f"In {sum(ordered)} of 5 languages; means from 0% to 88.9%: {words}.")


def half(rows: Sequence[Row]) -> Verdict:
    table = by_language(rows)
    parts = [(row["0%"] - row["1%"]) / (row["0%"] - row["88.9%"]) for row in table]
    answer = "holds" if min(parts) >= 0.5 else "refuted" if max(parts) < 0.5 else "cannot_tell"
    return Verdict(answer, f"Part of the way by language: {said(parts)}.")


def series(corpus: str, config: Config, seeds: tuple[int, ...], steps: int) -> Series:
    arms, budget = (Arm("dense", config),), Budget(steps=steps)
    return Series("confirm", corpus, Experiment(arms, seeds, budget, evaluations=1), (steps,))


NINE = (
    "Holds if it is 0.9 of that of the first language in every run, refuted if below 0.5 in each."
)
RULES = (
    Rule(
        "unseen",
        "Without exposure pass@256 is 0.",
        SOURCE,
        "Holds if it is 0 in every run, refuted if it is above 0.01 in every one.",
        unseen,
        (*WORDS, *ORDERS),
    ),
    *(
        Rule(id, f"{text}: 1% recovers pass@256.", SOURCE, NINE, one_percent, corpora)
        for id, text, corpora in (
            ("words", "Languages that differ in words alone", WORDS),
            ("order", "Languages that differ in words and order", ORDERS),
        )
    ),
    Rule(
        "guessing",
        "A language of 0.1% is covered for pass@256, by guessing, and not for Cover@0.5.",
        "arXiv 2510.08325",
        "Words and order. Holds if pass@256 is above half of what digits at random have, in the "
        "mean over runs, and Cover@0.5 is 0 in every run; refuted if it is below a quarter.",
        guessing,
        ORDERS,
    ),
    Rule(
        "falls",
        "In each natural language the loss falls with each larger share.",
        SOURCE,
        "Holds if it does from 0% to 88.9% in all five; refuted if not in the mean over them.",
        falls,
        PAGES,
    ),
    Rule(
        "half",
        "1% of a natural language goes half of the way from the loss of 0% to that of 88.9%.",
        SOURCE,
        "Holds if at least half in each of five, refuted if less in each.",
        half,
        PAGES,
    ),
)
STUDY = Study(
    "coverage",
    "What does a model cover in a language that is little or nothing of its training?",
    (
        series(WORDS[0], sums("same", 0), (101, 102, 103), 1500),
        series(ORDERS[0], sums("own", 0), (101, 102, 103), 1500),
        *(series(name, texts(i), (101,), 200) for i, name in enumerate(PAGES)),
    ),
    rules=RULES,
    scores=scores,
    notes="Two dense layers of width 64. Sums have five digits below five; 1,500 steps of 128 "
    "items, 32 test problems, which no language has in training, 256 samples of each. Sizes come "
    "from runs of other seeds, in which 1% was learned where languages differ in words, and not "
    "where they differ in order. All runs draw by the same numbers, so that models which know "
    "nothing draw alike. Help: 200 steps of 4,096 bytes, one seed, each language once with "
    "each share; pages are aligned, so that a page of validation may have been read in another "
    "language. What reinforcement learning does to coverage waits for such training.",
    tables={"sums": by_text, "bits/byte by share": by_language},
)
