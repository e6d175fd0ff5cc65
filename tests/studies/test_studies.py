"""Studies: the page states what was measured, verdicts follow their rules, counts are those by hand."""

import json
from pathlib import Path

import pytest

from headway.config import UsageError
from headway.lab.rows import read_rows
from headway.lab.studies_page import write_page
from headway.lab.study import Contrast, Study, expected, load, names, quick, tasks
from headway.model.paged import PAGE
from studies import (
    append_system,
    arms,
    batch_one_balance,
    diversity,
    document_noise,
    experts_touched,
    frontiers,
    ladder,
    latent_price,
    latent_vs_flat,
    levers,
    narrow,
    rates,
    reverse_release,
    routers,
)

MODULES = (
    append_system,
    reverse_release,
    experts_touched,
    batch_one_balance,
    diversity,
    document_noise,
)
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "numbers" / "studies"
STUDIES = [module.STUDY for module in MODULES]


def test_the_page_states_the_results(tmp_path):
    """Verdicts too: they are computed from the rows, by the registered claims."""
    write_page(ROOT / "studies", RESULTS, tmp_path / "studies.md")
    made = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for path in made:
        committed = ROOT / "docs" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), "run headway study list --page"


@pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.name)
def test_a_verdict_follows_from_the_rows(study):
    result = json.loads((RESULTS / f"{study.name}.json").read_text())
    verdict = study.judge(result["rows"])
    assert (result["answer"], result["why"]) == verdict
    assert (result["claim"], result["rule"]) == (study.claim, study.rule)
    assert result["cpu_seconds"] <= 600


def test_an_appended_instruction_keeps_the_prefix():
    cached = {arm: append_system.served(arm, 2) for arm in ("unchanged", "appended", "edited")}
    assert cached["appended"][1] == cached["unchanged"][1] > 600
    assert 400 < cached["edited"][1] < 430 < 600 < cached["edited"][0]


def test_reverse_release_keeps_heads():
    """A text of four pages, then another that needs two of them, then the first again."""
    a, b = [1] * 4 * PAGE, [2] * 2 * PAGE
    one_at_a_time = [a, b, a]
    before = reverse_release.AT_ONCE
    reverse_release.AT_ONCE = 1
    try:
        assert reverse_release.hit_rate(one_at_a_time, 4, tails_first=True) == 2 / 10
        assert reverse_release.hit_rate(one_at_a_time, 4, tails_first=False) == 0
    finally:
        reverse_release.AT_ONCE = before


@pytest.mark.parametrize(
    ("gain", "answer"), [(0.1, "holds"), (0.01, "cannot_tell"), (-0.1, "refuted")]
)
def test_reverse_release_judges_by_two_standard_errors(gain, answer):
    rows = [{"gain": 0.2, "its standard error": 0.01}, {"gain": gain, "its standard error": 0.02}]
    assert reverse_release.judge(rows).answer == answer


def test_the_verdict_of_latent_vs_flat_has_levers():
    """Each lever with its prediction and what was measured; slices are confirmed as `2 slices`."""

    def row(stage, arm, seed, budget, bits):
        return {
            "stage": stage, "arm": arm, "seed": seed, "budget": budget, "bits_per_byte": bits,
            "corpus": "python",
        }  # fmt: skip

    rows = [
        *(row("screen", "2x64", s, 250, 2.0) for s in (0, 1)),
        row("screen", "L1 slices", 0, 250, 1.97),
        row("screen", "L1 slices", 1, 250, 1.99),
        row("screen", "L9 tied", 0, 250, None),
        *(
            row("confirm", "2x64", s, n, b)
            for s in range(101, 109)
            for n, b in ((250, 9.0), (2000, 1.5))
        ),
        *(row("confirm", "2 slices", s, 2000, 1.53) for s in range(101, 109)),
    ]
    (slices,) = latent_vs_flat.STUDY.tables["levers"](rows)
    assert slices["name"] == "L1 slices" and slices["prediction"] == -0.020
    assert slices["screen"] == pytest.approx(-0.02) and slices["screening seeds"] == 2
    assert slices["confirm"] == pytest.approx(0.03) and slices["confirming seeds"] == 8
    for budget in (250, 4000):  # one pair at a longer budget is none, and eight at a shorter less
        more = [row("confirm", arm, 101, budget, 1.3) for arm in ("2x64", "2 slices")]
        assert latent_vs_flat.STUDY.tables["levers"]([*rows, *more]) == [slices]
    longer = row("confirm", "another design", 101, 4000, 1.4)
    assert latent_vs_flat.STUDY.tables["levers"]([*rows, longer]) == [slices]
    measured = {"where": "a cluster", "design": "flat", "over flat": 1.0}  # as of `step_times`
    assert latent_vs_flat.STUDY.tables["levers"]([*rows, measured]) == [slices]
    committed = latent_vs_flat.STUDY.tables["levers"](read_rows(RESULTS / "levers.json"))
    assert len(committed) == len(levers.LEVERS) and all(row["screen"] for row in committed)


TRAINED = [
    study
    for name in names(ROOT / "studies")
    if isinstance(study := load(name, ROOT / "studies"), Study)
]


@pytest.mark.parametrize("study", TRAINED, ids=lambda s: s.name)
def test_claims_read_runs_that_the_study_trains(study):
    """Each contrast names an arm, a text and a budget of the confirming series, with enough seeds;
    and the study has what `--quick` trains."""
    keys = expected(study, "confirm")
    for claim in study.claims:
        for contrast in claim.contrasts:
            for arm in (contrast.arm, contrast.baseline):
                seeds = {
                    k[3] for k in keys if (k[1], k[2], k[4]) == (claim.corpus, arm, contrast.steps)
                }
                assert len(seeds) >= claim.min_seeds, (claim.id, arm, contrast.steps)
    todo = list(tasks(quick(study)))
    assert {(t.stage, t.corpus, t.arm) for t in todo} == {
        (series.stage, series.corpus, arm.name)
        for series in study.series
        for arm in series.experiment.arms
    }


def test_designs_of_the_frontier_send_as_many_bytes():
    """Flat, Multi-Head LatentMoE and both forms of LatentMoE, as the plan counts them."""
    series = frontiers.TRAFFIC
    arms = {name: by[frontiers.LATE] for name, by in series.plan(lambda _: None).items()}
    sent = [arm.costs["bytes_per_token"] for arm in arms.values()]
    assert max(sent) / min(sent) < 1.02 and len(set(sent)) == 4
    total = [arm.costs["total_parameters"] for arm in arms.values()]
    assert max(total) / min(total) < 1.023
    assert all(abs(arm.mismatch["train_flops"]) < 0.003 for arm in arms.values())


def test_tables_of_pairs_and_means_are_of_one_text():
    """Runs on a second text are neither left out nor averaged with those on the first one."""
    readers = {
        "levers": latent_vs_flat.STUDY.tables["levers"],
        "latent_price": latent_price.flops,
        "routers": routers.table,
        "rates": rates.table,
        "slicing_and_dicing": narrow.means,
        "ladder": ladder.summary,
    }
    for name, read in readers.items():
        rows = read_rows(RESULTS / f"{name}.json")
        assert read(rows)
        again = [row | {"corpus": "kernel-docs", "bits_per_byte": 9.0} for row in rows]
        with pytest.raises(UsageError, match="runs on kernel-docs and .* are not compared"):
            read([*rows, *again])
    # of arms that a contrast does not name, none is read
    pair = Contrast("L1 slices", "2x64", 250)
    rows = read_rows(RESULTS / "levers.json")
    other = [row | {"corpus": "kernel-docs"} for row in rows if row["arm"] == "flat"]
    assert arms.differences([*rows, *other], "screen", pair) == arms.differences(
        rows, "screen", pair
    )


@pytest.mark.parametrize("name", names(ROOT / "studies"))
def test_a_study_is_read_in_one_sitting(name):
    assert len((ROOT / "studies" / f"{name}.py").read_text("utf-8").splitlines()) <= 150
