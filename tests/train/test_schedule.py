"""Bounds, end points, shape and continuity of the learning rate."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import OptimConfig, UsageError
from headway.train.schedule import check_schedule, lr_factor

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
    check_schedule(config)
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
        check_schedule(OptimConfig(**change))
