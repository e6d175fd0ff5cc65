import numpy as np
import pytest

from headway.eval.calibration import Calibration


def test_by_hand():
    confidence = np.array([0.95, 0.85, 1.0000001, 0.12, 0.18])
    calibration = Calibration.of(confidence, np.array([True, False, True, False, True]))
    assert [row["n"] for row in calibration.bins()] == [2, 1, 2]
    assert [row["right"] for row in calibration.bins()] == [0.5, 0.0, 1.0]
    expected = (abs(0.30 - 1) + abs(0.85 - 0) + abs(1.95 - 2)) / 5
    assert calibration.error == pytest.approx(expected, abs=1e-6)
    assert "15% → 50%, 85% → 0%, 98% → 100%" in calibration.sentence


def test_without_a_probability_the_error_is_not_a_number():
    calibration = Calibration.of(np.array([0.95, np.nan]), np.array([True, False]))
    assert np.isnan(calibration.error) and [row["n"] for row in calibration.bins()] == [1, 1]


def test_predictions_right_as_often_as_they_say_are_calibrated():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1.0, 200_000)
    parts = np.array_split(np.arange(len(confidence)), 3)
    right = rng.uniform(size=len(confidence)) < confidence
    whole = Calibration.of(confidence, right)
    assert whole.error < 0.005
    added = sum(Calibration.of(confidence[p], right[p]).sums_3B for p in parts)
    np.testing.assert_allclose(whole.sums_3B, added)
    assert Calibration.of(confidence, confidence > 2).error == pytest.approx(0.6, abs=0.01)
