import numpy as np
import pytest

from headway.eval.multiple_choice import Question, multiple_choice


def question(log_probs, n_bytes, n_tokens, *right):
    sizes = (np.array(x, dtype=np.float64) for x in (log_probs, n_bytes, n_tokens))
    return Question(*sizes, frozenset(right))


def test_three_ways_to_compare_choices():
    """The longest has the lowest sum, the highest per byte; per token the second wins."""
    one = question([-2.0, -3.0, -4.0], [2, 4, 16], [1, 3, 2], 0)
    answers = {}
    for right in range(3):
        answers[right] = multiple_choice([one._replace(right=frozenset([right]))])
    by = {name: [answers[r][name] for r in range(3)] for name in answers[0] if "accuracy" in name}
    assert by == {
        "accuracy": [1, 0, 0],
        "accuracy_per_byte": [0, 0, 1],
        "accuracy_per_token": [0, 1, 0],
    }


def test_shares_of_choices_are_calibrated_or_not():
    sure = question(np.log([0.09, 0.01]), [1, 1], [1, 1], 0)
    wrong = question([-1000.0, -1000.0 - np.log(9)], [1, 1], [1, 1], 1)
    both = question([-1.0, -1.0], [1, 1], [1, 1], 0, 1)
    said = multiple_choice([sure] * 9 + [wrong])
    assert said["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert [row["right"] for row in said["calibration"]] == [0.9]
    assert multiple_choice([wrong])["calibration_error"] == pytest.approx(0.9)
    assert multiple_choice([both])["accuracy"] == 1 and multiple_choice([both])["questions"] == 1
