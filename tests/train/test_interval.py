"""Interval means, their exact round trip through JSON, spikes."""

import json
import math
import random

import pytest
import torch

from headway.model.balance import RouteStats
from headway.train.interval import Interval, SpikeDetector
from headway.train.step import Gradient


def _route(counts, entropy):
    zero = torch.zeros(())
    return RouteStats(torch.tensor(counts), zero, zero, torch.tensor(entropy), zero, None)


def _step(loss_sum, weight, n_bytes, balance, norm, routes):
    return Gradient(loss_sum, weight, n_bytes, balance, norm, routes, signals=0)


def _filled():
    interval = Interval()
    interval.add_time(100, 0.5)
    interval.add_step(_step(30.0, 10.0, 8, 0.01, 2.0, [_route([[1.0, 3.0]], [0.25, 0.75])]))
    interval.add_time(100, 0.5)  # skipped
    interval.add_time(100, 1.0)
    interval.add_step(_step(10.0, 10.0, 12, 0.03, 1.0, [_route([[2.0, 2.0]], [0.1, 0.2])]))
    return interval


def test_means_over_the_steps_that_counted():
    record = _filled().record()
    assert record["loss"] == pytest.approx(2.0)
    assert record["bits_per_byte"] == pytest.approx(40 / 20 / math.log(2))
    assert record["grad_norm"] == 1.5 and record["balance_loss"] == pytest.approx(0.02)
    assert record["tokens_per_second"] == 150.0
    assert record["load"] == [[[0.75, 1.25]]]
    assert (record["load_min"], record["load_max"], record["dead"]) == (0.75, 1.25, 0)
    assert record["entropy"] == [pytest.approx((0.5 + 0.15) / 2)]


def test_an_interval_of_skipped_steps_has_no_loss():
    interval = Interval()
    interval.add_time(10, 1.0)
    record = interval.record()
    assert math.isnan(record["loss"]) and math.isnan(record["grad_norm"]) and record["load"] == []


def test_round_trip_is_exact():
    interval = _filled()
    interval.nats = 0.1 + 0.2
    interval.entropy = [torch.tensor(1 / 3)]
    again = Interval.from_dict(json.loads(json.dumps(interval.to_dict())))
    for part in (interval, again):
        part.add_step(_step(1 / 3, 7.0, 5, 1e-3, 0.7, [_route([[5.0, 0.0]], [1 / 3])]))
    assert interval.record() == again.record()
    assert interval.to_dict() == again.to_dict()


def test_spikes_stand_out_of_the_running_deviation():
    drawn = random.Random(0)
    detector = SpikeDetector(limit=6.0)
    assert not detector.is_spike(1e9)  # nothing to compare with yet
    for _ in range(300):
        loss = drawn.gauss(3.0, 0.1)
        assert not detector.is_spike(loss)
        detector.add(loss)
    assert detector.mean == pytest.approx(3.0, abs=0.05)
    assert math.sqrt(detector.variance) == pytest.approx(0.1, rel=0.3)
    assert detector.is_spike(4.0) and not detector.is_spike(3.3) and not detector.is_spike(0.0)
    assert not SpikeDetector(0.0, **detector.to_dict()).is_spike(1e9)
    again = SpikeDetector(6.0, **json.loads(json.dumps(detector.to_dict())))
    assert (again.mean, again.variance, again.seen) == (detector.mean, detector.variance, 300)
