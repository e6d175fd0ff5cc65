import pytest
import torch

from headway.config import ModelConfig, RopeConfig
from headway.model.context import Context, DenseCache, Positions
from headway.model.init import init_weights
from headway.model.mixers.attention import Attention
from tests.compare import assert_close
from tests.kernels.cpp_paths import needs_native
from tests.model.mixers.attention_reference import attention_reference


def config(**options) -> ModelConfig:
    return ModelConfig(**({"d_model": 16, "n_heads": 4} | options))


def build(window=0, **options):
    layer = Attention(config(**options), window).double()
    init_weights(layer, seed=0)
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() == 1:  # norms and biases
                p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return layer


OPTIONS = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1},
    {"qk_norm": "none"},
    {"qk_norm": "all", "clip_qkv": 0.5, "n_kv_heads": 2},
    {"clip_qkv": 0.5},
    {"qkv_bias": True, "o_bias": True, "n_kv_heads": 1},
    {"attn_gate": True},
    {"sinks": True, "n_kv_heads": 2},
    {"d_head": 6},
    {"d_head": 6, "rope": RopeConfig(rotary_dim=4)},
    {"rope": RopeConfig(interleaved=True), "qk_norm": "none"},
    {"rope": RopeConfig(rotary_dim=2, interleaved=True), "n_kv_heads": 2},
    {"rope": RopeConfig(scaling="yarn", factor=4.0, original_max_len=64), "rope_theta": 10.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("window", [0, 3])
def test_equals_the_definition_with_gradient(options, window):
    layer = build(window, **options)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(
        [[j <= i and (not window or j > i - window) for j in range(7)] for i in range(7)]
    )
    got, want = layer(x), attention_reference(layer, x, mask, config(**options))
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
@pytest.mark.parametrize("options", OPTIONS, ids=str)
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
    mask, first_BS = positions.visible(2, torch.float32)
    assert mask is not None and first_BS is None
    assert mask.tolist() == [[False, False, False, True, True]]
    assert positions.visible(0, torch.float32) == (None, None)


@needs_native
def test_what_is_seen_is_a_first_key_for_the_kernel_and_a_mask_for_others():
    doc = torch.tensor([[3, 3, 3, 4, 4], [0, 1, 1, 0, 0]], dtype=torch.int32)
    positions = Positions(2, 5, torch.device("cpu"), doc_BS=doc)
    mask, first_BS = positions.visible(2, torch.float32)
    assert mask is None and first_BS is not None and first_BS.dtype == torch.int32
    assert first_BS.tolist() == [[0, 0, 1, 3, 3], [0, 1, 1, 3, 3]]
    assert positions.visible(2, torch.float32)[1] is first_BS  # made once
    mask, none = positions.visible(2, torch.float64)
    assert mask is not None and none is None and mask.shape == (2, 1, 5, 5)
    for b in range(2):
        for i in range(5):
            seen = [j for j in range(5) if i - 2 < j <= i and doc[b, i] == doc[b, j]]
            assert mask[b, 0, i].nonzero().flatten().tolist() == seen


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("documents", [False, True])
def test_the_kernel_equals_the_mask_of_float64(window, documents, options):
    layer, wide = build(window, **options).float(), build(window, **options)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    doc = (torch.arange(40) // 7).int() + torch.zeros(2, 1, dtype=torch.int32)
    ctx = Context(doc if documents else None)
    d_out = torch.randn_like(x)
    results = []
    for model, dtype in ((layer, torch.float32), (wide, torch.float64)):
        out = model(x.to(dtype), ctx)
        results.append((out, *torch.autograd.grad(out, [*model.parameters()], d_out.to(dtype))))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-5)
    if not documents:
        cache = DenseCache([layer.init_state(2, 40, torch.float32, x.device)], 2)
        prefill = layer(x.float(), Context(cache=cache))
        assert torch.equal(prefill, results[0][0])
