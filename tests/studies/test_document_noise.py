"""The error over documents is that of documents which are drawn anew."""

import numpy as np
import pytest

from studies import document_noise


def test_error_over_documents_is_that_of_drawing_anew():
    rng = np.random.default_rng(0)
    bytes_N = rng.integers(100, 4000, 400).astype(float)
    difference_N = 0.02 * bytes_N + rng.normal(0, 30, 400)
    drawn_BN = rng.integers(0, 400, (4000, 400))
    ratios_B = difference_N[drawn_BN].sum(1) / bytes_N[drawn_BN].sum(1)
    error = document_noise.error_over_documents(difference_N, bytes_N)
    assert error == pytest.approx(ratios_B.std(ddof=1), rel=0.05)


@pytest.mark.parametrize(
    ("shares", "answer"),
    [((0.5, 0.1), "holds"), ((0.6, 0.1), "cannot_tell"), ((1.1, 0.1), "refuted")],
)
def test_the_rule(shares, answer):
    rows = [{"steps": i, "documents / seeds": share} for i, share in enumerate(shares)]
    assert document_noise.judge(rows).answer == answer
