"""Muon against torch.optim.Muon on matrices, and stacks against their matrices one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.optim.muon import Muon, newton_schulz

SHAPES = [(8, 8), (12, 5), (5, 12)]


def _pair(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    return ours, theirs, generator


def _run(ours, theirs, mine, peer, generator, steps=4, scale=1.0):
    for _ in range(steps):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad * scale
        mine.step(scale)
        peer.step()


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_bit_for_bit_in_bfloat16(adjust, nesterov):
    ours, theirs, generator = _pair(SHAPES)
    mine = Muon(ours, lr=0.02, weight_decay=0.1, adjust=adjust, nesterov=nesterov)
    peer = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov
    )
    _run(ours, theirs, mine, peer, generator, scale=0.5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torch_in_float32(adjust, monkeypatch):
    # torch always goes through Tensor.bfloat16(); without that rounding it is the float32
    # iteration.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    ours, theirs, generator = _pair(SHAPES)
    mine = Muon(ours, lr=0.02, weight_decay=0.1, adjust=adjust, dtype=torch.float32)
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    _run(ours, theirs, mine, peer, generator)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_float32_update_is_within_bfloat16_rounding_of_torch():
    ours, theirs, generator = _pair([(16, 24)])
    mine = Muon(ours, lr=1.0, weight_decay=0.0, dtype=torch.float32)
    peer = torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0)
    start = ours[0].detach().clone()
    _run(ours, theirs, mine, peer, generator, steps=1)
    difference = (ours[0] - theirs[0]).norm() / (theirs[0] - start).norm()
    assert 0 < difference < 2e-2


@pytest.mark.parametrize("chunk", [1, 130, 1 << 20])
def test_a_stack_is_updated_as_its_matrices_alone(chunk):
    stack = torch.nn.Parameter(torch.randn(2, 3, 6, 10, generator=torch.manual_seed(0)))
    alone = [torch.nn.Parameter(m.detach().clone()) for m in stack.reshape(-1, 6, 10)]
    mine = Muon([stack], lr=0.02, dtype=torch.float32, chunk=chunk)
    single = Muon(alone, lr=0.02, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        stack.grad = torch.randn(stack.shape, generator=generator)
        for p, g in zip(alone, stack.grad.reshape(-1, 6, 10), strict=True):
            p.grad = g.clone()
        mine.step()
        single.step()
    together = torch.stack([*alone]).reshape(stack.shape)
    torch.testing.assert_close(stack, together, rtol=1e-6, atol=1e-7)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    chunk=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
def test_parameters_of_one_shape_are_updated_as_each_alone(sizes, chunk, order):
    """Whatever the batches, the order of parameters, and rates that differ by group."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, 4, 6, generator=generator, dtype=torch.float64) for n in sizes]
    grads = [[torch.randn(x.shape, generator=generator).double() for x in start] for _ in range(2)]
    rates = [{"lr": 0.02 * (1 + i % 2), "weight_decay": 0.3 * (i % 2)} for i in range(len(start))]

    def run(indices, **options):
        parameters = {i: torch.nn.Parameter(start[i].clone()) for i in indices}
        groups = [
            {"params": [parameters[i] for i in indices if i % 2 == odd], **rates[odd]}
            for odd in (0, 1)
            if any(i % 2 == odd for i in indices)
        ]
        optimizer = Muon(groups, dtype=torch.float64, **options)
        for step, scale in enumerate((1.0, 0.5)):
            for i, p in parameters.items():
                p.grad = grads[step][i].clone()
            optimizer.step(scale)
        return {i: p.detach() for i, p in parameters.items()}

    indices = list(range(len(start)))
    order.shuffle(indices)
    together = run(indices, chunk=24 * chunk)
    for i, p in together.items():
        torch.testing.assert_close(p, run([i], chunk=24)[i], rtol=1e-12, atol=1e-12)


def test_transposed_matrices_move_as_their_transposes():
    wide = torch.nn.Parameter(torch.randn(4, 12, generator=torch.manual_seed(0)))
    tall = torch.nn.Parameter(wide.detach().T.contiguous())
    one = Muon([{"params": [wide], "transposed": True}], lr=0.02, dtype=torch.float32)
    other = Muon([tall], lr=0.02, dtype=torch.float32)
    wide.grad = torch.randn(4, 12, generator=torch.manual_seed(1))
    tall.grad = wide.grad.T.contiguous()
    one.step()
    other.step()
    torch.testing.assert_close(wide.T, tall, rtol=1e-6, atol=1e-7)


def test_newton_schulz_brings_singular_values_near_one():
    stack = torch.randn(3, 16, 40, generator=torch.manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(stack, torch.float64))
    assert values.min() > 0.5 and values.max() < 1.5


def test_a_zero_gradient_only_decays():
    p = torch.nn.Parameter(torch.ones(2, 3, 4))
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1, weight_decay=0.5, dtype=torch.float32).step()
    torch.testing.assert_close(p.detach(), torch.full((2, 3, 4), 0.95))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="needs matrices"):
        Muon([torch.nn.Parameter(torch.ones(3))])
