"""`headway law gain`: the compute that a change saves, its interval, and whether it transfers."""

import numpy as np
import pytest

from bench.laws import MARIN
from headway.lab import laws
from headway.lab.forecast import Fit
from headway.lab.gain import gain
from headway.lab.laws import Irreducible
from tests.cli.law_tables import csv, facts, fitted
from tests.command import call


@pytest.fixture
def marin(tmp_path):
    return csv(tmp_path / "marin.csv", "flops,loss", MARIN)


def test_the_gain_of_marins_gate(marin, tmp_path):
    """3.5422 at 434.0k tokens/s against 3.52 at 410k: a speed-up of 1.067 by their formula."""
    head = "flops,loss,baseline,tokens_per_second,baseline_tokens_per_second"
    change = csv(
        tmp_path / "c.csv",
        head,
        [(3.82e17, 3.52, 3.5422, 410, 434), (2.81e18, 3.33, 3.34, 410, 434)],
    )
    fit, done = fitted(marin, "--irreducible", "1.6")
    first = call("law", "gain", fit, change, "--json").json["rungs"][0]
    assert first["gain"] == pytest.approx((1.9422 / 1.92) ** (1 / done.json["parameters"]["alpha"]))
    assert first["speedup"] == pytest.approx(1.067, abs=1e-3)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((1.3, 1.3), "gains"),
        ((0.7, 0.75), "loses"),
        ((0.8, 1.25), "not transferable"),
        ((1.01, 1.01), "cannot tell"),
    ],
)
def test_a_gain_and_whether_it_transfers(marin, tmp_path, gains, verdict):
    """The ladder of a baseline, and a change that reaches its losses with less compute; Marin's trial of output-head
    scales lost at width 512 and won at 768."""
    fit, done = fitted(marin, "--irreducible", "1.6")
    A, alpha = (done.json["parameters"][name] for name in ("A", "alpha"))
    rows = [(C, 1.6 + A * (g * C) ** -alpha) for C, g in zip((3e18, 3e19), gains, strict=True)]
    answer = call("law", "gain", fit, csv(tmp_path / "c.csv", "flops,loss", rows), "--json")
    assert answer.json["verdict"] == verdict and answer.json["sure"] == (verdict != "cannot tell")
    assert [rung["gain"] for rung in answer.json["rungs"]] == pytest.approx(gains, rel=1e-6)
    assert all(rung["low"] < rung["gain"] < rung["high"] for rung in answer.json["rungs"])
    assert verdict in answer.out


def test_the_interval_of_a_gain_holds_it(tmp_path):
    """Of 60 noisy ladders and changes 90% intervals hold the true gain about as often."""
    held = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        C = np.geomspace(1e18, 3e20, 8)
        y = (1.6 + 95.18 * C**-0.0941) * np.exp(0.002 * rng.standard_normal(8))
        law = laws.fit("power", {"flops": C}, y, Irreducible(1.6), bootstraps=200, seed=seed)
        fit = Fit(law, (), None, np.zeros(200), facts(0.9))
        at = np.array([3e18, 1e20])
        changed = (1.6 + 95.18 * (1.3 * at) ** -0.0941) * np.exp(0.002 * rng.standard_normal(2))
        result = gain(fit, csv(tmp_path / "c.csv", "flops,loss", zip(at, changed, strict=True)))
        held += [rung.low <= 1.3 <= rung.high for rung in result.rungs]
    assert 0.82 <= np.mean(held) <= 0.97


def test_seed_noise_widens_the_interval_of_a_gain_and_seeds_narrow_it(marin, tmp_path):
    """A means-of-seeds ladder: one run more deviates by 0.02 nats, which its residuals lack."""
    at = [(3e18, 3.3), (1e20, 2.82)]
    one, four = (csv(tmp_path / f"{n}.csv", "flops,loss", at * n) for n in (1, 4))
    widths = []
    for noise, change in (("0", one), ("0.02", one), ("0.02", four)):
        fit, done = fitted(marin, "--irreducible", "1.6", "--seed-noise", noise)
        rung = call("law", "gain", fit, change, "--json").json["rungs"][0]
        widths.append(np.log(rung["high"] / rung["low"]))
    expected = 2 * 1.645 * 0.02 / (3.3 - 1.6) / done.json["parameters"]["alpha"]
    assert widths[1] == pytest.approx(np.hypot(widths[0], expected), rel=0.1)
    assert widths[2] < 0.65 * widths[1]


def test_a_replicate_with_an_irreducible_loss_above_both_losses_is_no_gain_of_the_baseline(
    tmp_path,
):
    """Losses of baseline and change just above the irreducible loss, with seed noise that is larger
    than the rest: of replicates that hold neither loss no finite gain is made up."""
    C = np.geomspace(1e18, 3e20, 8)
    law = laws.fit("power", {"flops": C}, 2 + 1e5 * C**-0.3, Irreducible(2.0), bootstraps=400)
    noise_R = np.random.default_rng(0).choice([-0.3, 0.3], 400)
    fit = Fit(law, (), None, noise_R, facts(0.9))
    rows = [(c, 2.05, 2.1) for c in (1e19, 1e20)]
    result = gain(fit, csv(tmp_path / "c.csv", "flops,loss,baseline", rows))
    assert all(rung.low == 0 and rung.high == np.inf for rung in result.rungs)
