import torch

from headway.kernels.rope import rope, rope_reference, rope_tables
from tests.compare import assert_close


def test_equals_reference_with_gradient():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_tables(torch.arange(5), 8, 10_000.0, torch.float64)
    d_out = torch.randn_like(x)
    got = torch.autograd.grad(rope(x, cos, sin), x, d_out)[0]
    want = torch.autograd.grad(rope_reference(x, cos, sin), x, d_out)[0]
    assert_close(got, want, 1e-12)


def test_scores_depend_on_distance_only_and_norm_is_kept():
    q, k = (
        torch.randn(1, 1, 1, 8, dtype=torch.float64),
        torch.randn(1, 1, 1, 8, dtype=torch.float64),
    )

    def score(i, j):
        a = rope(q, *rope_tables(torch.tensor([i]), 8, 100.0, torch.float64))
        b = rope(k, *rope_tables(torch.tensor([j]), 8, 100.0, torch.float64))
        assert_close(torch.linalg.vector_norm(a), torch.linalg.vector_norm(q), 1e-12)
        return (a * b).sum()

    assert_close(score(9, 4), score(105, 100), 1e-10)
    assert abs(float(score(9, 4) - score(9, 5))) > 1e-6


def test_a_plane_turns_by_its_angle():
    """Pair (i, i + d/2) turns by position · theta^(−2i/d)."""
    cos, sin = rope_tables(torch.tensor([3]), 4, 100.0, torch.float64)
    out = rope(torch.tensor([1.0, 1.0, 0.0, 0.0]).double().view(1, 1, 1, 4), cos, sin).flatten()
    angle = torch.tensor([3.0, 3.0 / 10.0], dtype=torch.float64)
    assert_close(out, torch.cat((angle.cos(), angle.sin())), 1e-12)
