"""Seconds of plain collectives: by two numbers, and by what was measured."""

import pytest

from headway.plan.link import Curve, Link, Rates, parse_curve

RATES, WITHIN = Rates(1e6, 1e-3), Rates(4e6, 1e-3)
POINTS = ((0.0, 0.01), (1e6, 0.5), (3e6, 2.5))


def measured(collective="all_to_all", ranks=4, at_once=1, inside=False, scale=1.0):
    return Curve(collective, ranks, inside, at_once, tuple((n, scale * t) for n, t in POINTS))


def test_two_numbers():
    link = Link(4, False, RATES, WITHIN)
    assert link.exchange(2e6) == pytest.approx(2.0 + 3e-3)
    assert link.exchange(2e6, 3e6) == pytest.approx(3.0 + 3e-3)
    assert link.ring(2e6) == pytest.approx(2.0 + 6e-3)
    assert link.concurrent_speed(2e6) == 0.0 and link.work(2e6) == link.ring_work(2e6) == 0.0


def test_a_curve_is_straight_between_points_and_beyond():
    seconds = [measured().seconds(n) for n in (0, 5e5, 1e6, 2e6, 3e6, 4e6)]
    assert seconds == pytest.approx([0.01, 0.255, 0.5, 1.5, 2.5, 3.5])


def test_measured_times_come_first():
    curves = [measured(), measured(ranks=2, scale=2.0), measured("all_reduce", scale=0.5)]
    link = Link(4, False, RATES, WITHIN, curves)
    assert link.exchange(2e6) == pytest.approx(1.5) and link.ring(2e6) == pytest.approx(0.75)
    assert Link(2, False, RATES, WITHIN, curves).exchange(2e6) == pytest.approx(3.0)
    assert Link(64, False, RATES, WITHIN, curves).exchange(2e6) == pytest.approx(1.5)
    inside = Link(4, True, WITHIN, WITHIN, curves)  # nothing was measured within a node
    assert inside.exchange(2e6) == pytest.approx(0.5 + 3e-3)


def test_the_fullest_link_has_its_rate_for_itself():
    """Even, 2e6 take 1.5 s; the link with 4e6 takes what a ring of that size does."""
    link = Link(4, False, RATES, WITHIN, [measured(), measured("all_reduce", scale=0.5)])
    assert link.exchange(2e6, 4e6) == pytest.approx(3.5 / 2)
    assert link.exchange(2e6, 2.1e6) == pytest.approx(1.5)


def test_two_at_once():
    """Two of 1e6 (0.5 s alone) in 0.75 s: each at two thirds of its speed."""
    link = Link(4, False, RATES, WITHIN, [measured(), measured(at_once=2, scale=0.5)])
    assert link.concurrent_speed(1e6) == pytest.approx(2 / 3)


def test_the_work_of_a_host_that_moves_bytes_itself():
    """All that it takes where no link limits it, or what was measured beside other work there."""
    link = Link(4, False, RATES, WITHIN, cpu_driven=True)
    assert link.work(2e6) == pytest.approx(0.5 + 3e-3)
    assert link.ring_work(2e6) == pytest.approx(0.5 + 6e-3)
    curves = [measured(), measured("overlap_cost", inside=True, scale=2.0)]
    for cpu_driven in (True, False):
        assert Link(4, False, RATES, WITHIN, curves, cpu_driven).work(1e6) == pytest.approx(1.0)


def test_a_curve_of_a_file():
    values = {"collective": "all_to_all", "ranks": 4, "inside": False, "at_once": 1}
    assert parse_curve(values | {"points": [list(p) for p in POINTS]}) == measured()
    for points in ([], [[2, 1], [1, 2]], [[1, 0]], [[1]]):
        with pytest.raises(ValueError, match="points|unpack"):
            parse_curve(values | {"points": points})
