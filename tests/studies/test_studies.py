"""Studies: the page states what was measured, verdicts follow their rules, counts are those by hand."""

import json
from pathlib import Path

import pytest

from headway.lab.studies_page import write_page
from headway.model.paged import PAGE
from studies import append_system, batch_one_balance, experts_touched, reverse_release

MODULES = append_system, reverse_release, experts_touched, batch_one_balance
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
