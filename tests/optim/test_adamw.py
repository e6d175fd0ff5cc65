"""AdamW against torch's own, bfloat16 moments against float32 ones, the clip factor inside the
step."""

import pytest
import torch

from headway.optim import adamw as module
from headway.optim.adamw import AdamW
from tests.kernels.cpp_paths import needs_native, switch_off


def _params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(40, 7), (3,), (999,)]
    ]


def _set_grads(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * p.detach().abs()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_equals_torch_adamw(scale):
    ours, theirs = _params(), _params()
    mine = AdamW(ours, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    peer = torch.optim.AdamW(
        theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        _set_grads(ours, generator)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad * scale
        mine.step(scale)  # a power of two: scaling inside and outside round alike
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(mine.state[a]["exp_avg_sq"], peer.state[b]["exp_avg_sq"])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_each_group_has_its_own_epsilon(state_dtype, native, monkeypatch):
    """Those of its group alone, and one of 10 makes another step than 1e-8."""
    if not native:
        switch_off(monkeypatch, module)
    together, alone = _params(), _params()
    epsilons = [1e-8, 10.0, 1e-3]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "state_dtype": state_dtype}
    groups = [{"params": [p], "eps": eps} for p, eps in zip(together, epsilons, strict=True)]
    one = AdamW(groups, **options)
    each = [AdamW([p], eps=eps, **options) for p, eps in zip(alone, epsilons, strict=True)]
    start = [p.detach().clone() for p in together]
    _set_grads(together, torch.Generator().manual_seed(1))
    for a, b in zip(together, alone, strict=True):
        b.grad = a.grad.clone()
    one.step()
    for optimizer in each:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    moved = [float((p.detach() - s).abs().mean()) for p, s in zip(together, start, strict=True)]
    assert moved[1] < 0.2 * min(moved[0], moved[2])


@pytest.mark.parametrize("chunk", [0, 64, 1 << 18])
def test_bfloat16_moments_follow_float32_ones(chunk, monkeypatch):
    if chunk:  # else the C++ kernel, where it runs
        switch_off(monkeypatch, module)
    wide, narrow = _params(), _params()
    start = [p.detach().clone() for p in wide]
    reference = AdamW(wide, lr=1e-2, weight_decay=0.0)
    mine = AdamW(narrow, lr=1e-2, weight_decay=0.0, state_dtype=torch.bfloat16, chunk=chunk or 64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        _set_grads(wide, generator)
        for a, b in zip(wide, narrow, strict=True):
            b.grad = a.grad.clone()
        reference.step()
        mine.step()
    for a, b, s in zip(wide, narrow, start, strict=True):
        assert mine.state[b]["exp_avg"].dtype == torch.bfloat16
        moved = (a - b).norm() / (a - s).norm()
        assert moved < 2e-2
        for key in ("exp_avg", "exp_avg_sq"):
            exact, rounded = reference.state[a][key], mine.state[b][key].float()
            assert (exact - rounded).norm() / exact.norm() < 1e-2


@needs_native
def test_cpp_equals_the_fused_kernel(monkeypatch):
    """Up to a last bit of a bfloat16 moment, which the two may round apart."""
    pairs = []
    for off in (False, True):
        if off:
            switch_off(monkeypatch, module)
        params = _params()
        optimizer = AdamW(params, lr=1e-2, state_dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            _set_grads(params, generator)
            optimizer.step(0.5)
        pairs.append((params, optimizer))
    for p, q in zip(pairs[0][0], pairs[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        for key in ("exp_avg", "exp_avg_sq"):
            ours, theirs = (pairs[i][1].state[x][key].float() for i, x in ((0, p), (1, q)))
            assert (ours - theirs).norm() / theirs.norm() < 1e-3


def test_slices_do_not_change_a_bit(monkeypatch):
    switch_off(monkeypatch, module)
    one, many = _params(), _params()
    whole = AdamW(one, state_dtype=torch.bfloat16)
    sliced = AdamW(many, state_dtype=torch.bfloat16, chunk=64)
    for _ in range(5):
        _set_grads(one, torch.Generator().manual_seed(2))
        for a, b in zip(one, many, strict=True):
            b.grad = a.grad.clone()
        whole.step(0.5)
        sliced.step(0.5)
    for a, b in zip(one, many, strict=True):
        assert torch.equal(a, b)


def test_slow_averages_are_refused_in_bfloat16():
    with pytest.raises(ValueError, match="beta2 <= 0.99 and got 0.999"):
        AdamW(_params(), betas=(0.9, 0.999), state_dtype=torch.bfloat16)
