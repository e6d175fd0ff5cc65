import pytest
import torch

from headway.config import ModelConfig
from headway.model.context import Context, DenseCache, Positions
from headway.model.init import init_weights
from headway.model.mixers.attention import Attention
from tests.compare import assert_close


def build(window=0, **options):
    layer = Attention(ModelConfig(**({"d_model": 16, "n_heads": 4} | options)), window).double()
    init_weights(layer, seed=0)
    return layer


def plain(layer, x, mask_SS):
    """Attention by its definition, one query at a time, from the layer's own projections."""
    q, k, v = (t.transpose(1, 2) for t in layer._qkv(x, Context().positions_of(x)))
    repeat = layer.n_heads // layer.n_kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    score = (q @ k.transpose(-1, -2)) / layer.d_head**0.5
    score = score.masked_fill(~mask_SS, -torch.inf)
    y = (torch.softmax(score, -1) @ v).transpose(1, 2)
    if layer.gate is not None:
        y = y * torch.sigmoid(x @ layer.gate.weight.T).unsqueeze(-1)
    return y.flatten(-2) @ layer.o.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1},
        {"qk_norm": False},
        {"attn_gate": True},
        {"d_head": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 3])
def test_equals_the_definition_with_gradient(options, window):
    layer = build(window, **options)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(
        [[j <= i and (not window or j > i - window) for j in range(7)] for i in range(7)]
    )
    got, want = layer(x), plain(layer, x, mask)
    assert_close(got, want, 1e-12)
    d_out = torch.randn_like(got)
    parameters = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, parameters, d_out),
        torch.autograd.grad(want, parameters, d_out),
        strict=True,
    ):
        assert_close(a, b, 1e-11)


def test_documents_do_not_see_each_other():
    layer = build()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    doc = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]], dtype=torch.int32)
    together = layer(x, Context(doc))
    changed = x.clone()
    changed[:, :3] += 1
    assert torch.equal(layer(changed, Context(doc))[:, 3:], together[:, 3:])
    assert not torch.equal(layer(changed)[:, 3:], layer(x)[:, 3:])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2, "attn_gate": True}], ids=str)
def test_steps_equal_forward(window, options):
    layer = build(window, **options)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = layer(x)
    cache = DenseCache([layer.init_state(2, 9, torch.float64, x.device)], 2)
    parts = []
    for begin, end in ((0, 4), (4, 5), (5, 7), (7, 8), (8, 9)):
        parts.append(layer(x[:, begin:end], Context(cache=cache)))
        cache.advance([end - begin] * 2)
    assert_close(torch.cat(parts, 1), want, 1e-12)


def test_causal_mask_of_a_late_query():
    positions = Positions(1, 1, torch.device("cpu"), [4])
    assert positions.mask(2).tolist() == [[False, False, False, True, True]]
    assert positions.mask(0) is None
