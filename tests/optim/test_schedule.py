"""Bounds, end points, shape and continuity of the learning rate."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import OptimConfig, UsageError
from headway.optim.schedule import change, lr_factor, steps_before_fall

configs = st.builds(
    lambda steps, schedule, warmup, fall, floor: OptimConfig(
        steps=steps,
        schedule=schedule,
        warmup=warmup,
        decay=max(1e-3, fall * (1 - warmup)),
        min_lr_ratio=floor,
    ),
    st.integers(1, 400),
    st.sampled_from(["wsd", "cosine", "trapezoid"]),
    st.floats(0, 0.9),
    st.floats(0.01, 1),
    st.floats(0, 1),
)


@given(configs)
@settings(max_examples=150, deadline=None)
def test_bounds_and_single_rise_and_fall(config):
    config.check()
    rates = [lr_factor(i, config) for i in range(config.steps)]
    assert all(0 <= r <= 1 for r in rates)
    assert max(rates) == 1.0
    top = rates.index(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    falls = config.steps - 1 > top
    assert rates[-1] == pytest.approx(config.min_lr_ratio if falls else 1.0, abs=1e-12)


@given(configs)
@settings(max_examples=100, deadline=None)
def test_no_jump_is_larger_than_the_steepest_slope(config):
    rates = [lr_factor(i, config) for i in range(config.steps)]
    warm = max(1, min(int(config.warmup * config.steps), config.steps - 1))
    falling = sum(r < 1 for r in rates[warm - 1 :]) or 1
    steepest = {"wsd": math.sqrt(1 / falling), "trapezoid": 1 / falling, "cosine": 2 / falling}
    bound = max(1 / warm, steepest[config.schedule]) + 1e-9
    assert max((abs(a - b) for a, b in zip(rates, rates[1:], strict=False)), default=0) <= bound


def test_values_of_each_schedule():
    base = OptimConfig(steps=101, warmup=0.1, decay=0.4, min_lr_ratio=0.2)
    assert [lr_factor(i, base) for i in (0, 4, 9, 10, 60)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert lr_factor(70, base) == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(0.25)))
    line = dataclasses.replace(base, schedule="trapezoid")
    assert lr_factor(70, line) == pytest.approx(0.2 + 0.8 * 0.75)
    half = dataclasses.replace(base, schedule="cosine", warmup=0.0)
    assert lr_factor(50, half) == pytest.approx(0.6)
    assert [lr_factor(100, c) for c in (base, line, half)] == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"warmup": 0.8, "decay": 0.5}, "optim.decay=0.5 .* optim.warmup=0.8"),
        ({"warmup": 1.0}, "optim.warmup=1.0"),
        ({"min_lr_ratio": 2.0}, "optim.min_lr_ratio=2.0"),
        ({"steps": 0}, "optim.steps=0"),
    ],
)
def test_impossible_schedules_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        OptimConfig(**change).check()


@given(configs)
@settings(max_examples=100, deadline=None)
def test_a_checkpoint_from_before_the_fall_has_seen_no_lower_rate_after_the_peak(config):
    rates = [lr_factor(i, config) for i in range(config.steps)]
    steps = steps_before_fall(config)
    assert rates[steps - 1] == 1.0
    # nearer to 1 the fall is lost in rounding
    assert config.min_lr_ratio > 1 - 1e-9 or all(rate < 1 for rate in rates[steps:])


WSD = OptimConfig(steps=100, lr=0.01, warmup=0.0, decay=0.3)
LONGER = dataclasses.replace(WSD, steps=200)
COSINE = dataclasses.replace(WSD, schedule="cosine", min_lr_ratio=0.1)


@pytest.mark.parametrize(
    "step, old, new, words",
    [
        (
            100,
            WSD,
            LONGER,
            "wsd over 100 steps and is wsd over 200 steps; the learning rate of step 100 was 0, that of step 101 is 0.01: a jump from zero",
        ),
        (85, WSD, LONGER, "step 85 was 0.00293, that of step 86 is 0.01: a jump by 3.41 times"),
        (60, WSD, LONGER, "step 60 was 0.01, that of step 61 is 0.01: no jump"),
        (
            150,
            LONGER,
            dataclasses.replace(LONGER, schedule="trapezoid"),
            "is trapezoid over 200 steps; .* 0.00592, that of step 151 is 0.00817: a jump by 1.38 times",
        ),
        (
            100,
            COSINE,
            dataclasses.replace(COSINE, steps=200),
            "cosine over 200 steps; .* was 0.001, that of step 101 is 0.00546: a jump by 5.46 times",
        ),
        (
            100,
            COSINE,
            dataclasses.replace(WSD, steps=200, lr=0.02),
            "was 0.001, that of step 101 is 0.02: a jump by 20 times",
        ),
    ],
)
def test_another_schedule_is_told_with_its_jump(step, old, new, words):
    line = change(step, old, new)
    assert re.search(words, line) and "\n" not in line
    assert change(step, new, new) == "" and change(0, old, new) == ""


def test_a_change_beside_the_rate_is_none():
    assert change(60, WSD, dataclasses.replace(WSD, clip=3.0, max_skipped=5)) == ""
