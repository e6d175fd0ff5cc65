"""Intervals and tests against SciPy's own, against simulated studies, and what one seed tells."""

import itertools
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.lab import statistics as s

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda x: np.std(x) > 1e-6)


@given(VALUES, st.floats(0.001, 0.5))
@settings(max_examples=100, deadline=None)
def test_equals_scipy(x, margin):
    result, want = s.paired(x), scipy.stats.ttest_1samp(x, 0.0)
    interval = want.confidence_interval(0.95)
    close = {"rel": 1e-10, "abs": 1e-12}
    assert result.p == pytest.approx(want.pvalue, **close)
    assert result.ci95 == pytest.approx((interval.low, interval.high), **close)
    assert result.sd == pytest.approx(np.std(x, ddof=1), **close)
    less = scipy.stats.ttest_1samp(x, margin, alternative="less").pvalue
    greater = scipy.stats.ttest_1samp(x, -margin, alternative="greater").pvalue
    assert s.p_not_worse(x, margin) == pytest.approx(less, **close)
    assert s.p_equal(x, margin) == pytest.approx(max(less, greater), **close)


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([0.5, 0.6]) == [1.0, 1.0]
    assert s.holm([]) == []


def test_one_seed_has_no_interval():
    result = s.paired([0.3])
    assert (result.n, result.mean, result.sd, result.ci95, result.p, result.mde80) == (
        1,
        0.3,
        *[None] * 4,
    )


def test_equal_differences_need_no_division():
    assert s.p_value([0.1, 0.1]) == 0.0 and s.p_value([0.0, 0.0]) == 1.0
    assert s.paired([0.0, 0.0, 0.0]).ci95 == (0.0, 0.0)


def test_what_a_study_sees_it_sees_in_80_percent():
    """Simulated, beside the non-central t."""
    rng = np.random.default_rng(0)
    for n in (3, 8):
        difference = s.detectable(0.012, n)
        assert s.power(difference, 0.012, n) == pytest.approx(0.8, abs=1e-9)
        x = rng.normal(difference, 0.012, (20_000, n))
        seen = (scipy.stats.ttest_1samp(x, 0.0, axis=1).pvalue < 0.05).mean()
        assert seen == pytest.approx(0.8, abs=0.012)
    n = s.seeds_for(0.005, 0.006)
    assert s.power(0.005, 0.006, n) >= 0.8 > s.power(0.005, 0.006, n - 1)
    assert s.seeds_for(1e-9, 1.0, most=50) == 50
    # far above ten thousand the number itself, as of a normal distribution
    assert s.seeds_for(1e-4, 0.03) == pytest.approx((2.801585 * 0.03 / 1e-4) ** 2, rel=1e-4)


NOISE, DOCUMENTS = 0.012, 100
"""Standard deviation of a run by its seed (bits/byte), as eight flat runs spread."""


@pytest.mark.parametrize("n", [3, 8, 16])
def test_null_studies_are_covered(n):
    """2,000 studies without a difference: the interval over seeds holds 0 in 94 to 96 of 100."""
    rng = np.random.default_rng(n)
    x = rng.normal(0, NOISE * 2**0.5, (2_000, n))
    intervals = [s.t_interval(row) for row in x]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.94 <= covered <= 0.96


@pytest.mark.parametrize("n", [3, 8])
def test_the_crossed_bootstrap_covers_new_seeds_and_new_documents(n):
    """Differences of a seed, of a document and of both; an interval over documents alone is too sure."""
    rng = np.random.default_rng(n)
    covered, alone, studies = 0, 0, 400
    bytes_N = rng.lognormal(0, 1, DOCUMENTS)
    for i in range(studies):
        by_seed = rng.normal(0, NOISE, (n, 1))
        by_document = rng.normal(0, 0.1, DOCUMENTS)
        rest = rng.normal(0, 0.05, (n, DOCUMENTS))
        bits = (by_seed + by_document + rest) * bytes_N * np.log(2)
        low, high = s.crossed_bootstrap(bits, np.zeros_like(bits), bytes_N, draws=400, seed=i)
        covered += low <= 0 <= high
        value = bits[0] / np.log(2)  # one pair, documents alone
        weights = s._counts(rng, 200, DOCUMENTS)
        draws = (weights @ value) / (weights @ bytes_N)
        alone += np.quantile(draws, 0.025) <= 0 <= np.quantile(draws, 0.975)
    assert covered / studies >= 0.93
    assert covered > alone


def test_the_bootstrap_is_where_its_mean_is_and_repeatable():
    rng = np.random.default_rng(1)
    arm, baseline, size = rng.random((3, 20)), rng.random((3, 20)), rng.random(20) + 1
    low, high = s.crossed_bootstrap(arm, baseline, size, draws=500)
    mean = (arm - baseline).mean(0).sum() / size.sum() / np.log(2)
    middle = (low + high) / 2
    assert low < high and middle == pytest.approx(mean, rel=1e-12)
    assert s.crossed_bootstrap(arm, baseline, size, draws=500) == (low, high)
    wide = s.crossed_bootstrap(
        np.repeat(arm, 50, 1), np.repeat(baseline, 50, 1), np.repeat(size, 50)
    )
    assert wide.high - wide.low < high - low  # more documents, of the same seeds


def test_ten_thousand_draws_of_a_thousand_documents_take_a_second():
    nats = np.random.default_rng(0).random((8, 1000))
    begin = time.process_time()
    s.crossed_bootstrap(nats, nats[::-1], np.ones(1000))
    assert time.process_time() - begin < 1.5


REGIONS = ("better", "not_worse", "equal")


def test_verdicts_by_their_intervals():
    """Alone in its family a claim has the 95% interval."""
    x = [0.001, -0.001, 0.002, 0.0]
    low, high = s.t_interval(x)
    assert low > -0.005 and high < 0.005
    answers = {r: s.verdicts([(x, r, 0.005)])[0].answer for r in REGIONS}
    assert answers == {"better": "refuted", "not_worse": "holds", "equal": "holds"}
    wide = [0.01, -0.01, 0.02, -0.02]
    assert {s.verdicts([(wide, r, 0.005)])[0].answer for r in REGIONS} == {"cannot_tell"}
    worse = [0.02, 0.021, 0.022]
    answers = {r: s.verdicts([(worse, r, 0.005)])[0].answer for r in REGIONS}
    assert answers == dict.fromkeys(REGIONS, "refuted")
    better = [-y for y in worse]
    answers = {r: s.verdicts([(better, r, 0.005)])[0].answer for r in REGIONS}
    assert answers == {"better": "holds", "not_worse": "holds", "equal": "refuted"}


@given(st.lists(VALUES, min_size=1, max_size=5), st.sampled_from(REGIONS))
@settings(max_examples=60, deadline=None)
def test_an_answer_is_what_its_interval_says(family, region):
    for x, v in zip(family, s.verdicts([(x, region, 0.2) for x in family]), strict=True):
        assert v.ci == pytest.approx(s.t_interval(x, v.alpha_adjusted))
        low, high = {"better": (-9, -0.2), "not_worse": (-9, 0.2), "equal": (-0.2, 0.2)}[region]
        if v.answer == "holds":
            assert low <= v.ci.low and v.ci.high <= high
        if v.answer == "refuted":
            assert v.ci.high <= low or high <= v.ci.low
    alone = s.verdicts([(family[0], region, 0.2)])[0]
    assert alone.alpha_adjusted == s.ALPHA


@pytest.mark.parametrize(
    ("region", "true"), [("better", -0.005), ("not_worse", 0.005), ("equal", 0.005)]
)
def test_a_false_claim_of_a_family_rarely_holds(region, true):
    """Five false claims, at the edge of their region: one of them holds in 5% of families or less."""
    rng = np.random.default_rng(2)
    wrong, families = 0, 1_000
    for n in itertools.islice(itertools.cycle([3, 8, 16]), families):
        family = [(rng.normal(true, 0.006, n), region, 0.005) for _ in range(5)]
        wrong += any(v.answer == "holds" for v in s.verdicts(family))
    assert wrong / families <= 0.05
