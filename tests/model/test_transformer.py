import math
from dataclasses import replace

import pytest
import torch

from headway.config import ModelConfig, MoEConfig
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.roles import stored_dtypes
from headway.model.transformer import Transformer
from tests.compare import assert_close

SMALL = ModelConfig(
    vocab_size=32,
    n_layers=3,
    d_model=16,
    n_heads=2,
    d_ff=24,
    moe=MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=8, n_dense_layers=1),
)


def tokens(batch=2, length=9, seed=0):
    x = torch.randint(0, 32, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return x[:, :-1], x[:, 1:]


@pytest.mark.parametrize(
    "change", [{}, {"tied": True}, {"logit_softcap": 3.0}, {"window": (0, 4)}], ids=str
)
def test_loss_is_the_cross_entropy_of_its_logits(change):
    model = Transformer(replace(SMALL, **change), Compute(dtype=torch.float64), seed=0).double()
    x, y = tokens()
    y = y.clone()
    y[0, :3] = -1
    logits = model(x).logits_BSV
    want = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum"
    )
    assert_close(model(x, y).nats, want, 1e-12)
    if change.get("logit_softcap"):
        assert float(logits.abs().max()) < 3.0


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_torch_func_takes_a_whole_model(dtype, bound):
    """Gradients of each sequence, and a tangent, by the reference of every operator."""
    model = Transformer(SMALL, Compute(dtype=dtype), seed=0).to(dtype)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, y = tokens(3)

    def loss(p, x, y):
        return torch.func.functional_call(model, p, (x[None], y[None])).nats

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(3):
        want = torch.autograd.grad(model(x[i : i + 1], y[i : i + 1]).nats, [*model.parameters()])
        for got, one in zip(each.values(), want, strict=True):
            assert_close(got[i], one, bound)
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, tangent = torch.func.jvp(lambda p: loss(p, x[0], y[0]), (parameters,), (directions,))
    slope = sum((each[name][0] * directions[name]).sum() for name in parameters)
    assert_close(tangent, slope, 10 * bound)


def test_a_model_in_bfloat16():
    """Weights and all: the loss is that of the same weights in float64. What a run keeps in float32
    stays so."""
    model = Transformer(SMALL, Compute(dtype=torch.bfloat16), seed=0).bfloat16()
    stored = {name: p.dtype for name, p in model.state_dict().items()}
    assert stored == stored_dtypes(model, torch.bfloat16)
    assert stored["norm.weight"] == torch.float32 and stored["embed.weight"] == torch.bfloat16
    wide = Transformer(SMALL, Compute(dtype=torch.float64)).double()
    wide.load_state_dict(model.state_dict())
    x, y = tokens(4, 20)
    assert_close(model(x, y).nats, wide(x, y).nats, 2e-3)
    model(x, y).nats.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_first_loss_is_log_v_and_seed_decides_the_weights():
    a, b, c = (Transformer(SMALL, seed=s) for s in (0, 0, 1))
    x, y = tokens(8, 32)
    assert float(a(x, y).nats) / y.numel() == pytest.approx(math.log(32), rel=0.02)
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_decoding_drops_nothing_whatever_the_capacity():
    """Else a text would depend on the pieces in which it is decoded."""
    bounded = replace(SMALL, moe=replace(SMALL.moe, capacity_factor=0.5))
    model, free = (
        Transformer(c, Compute(dtype=torch.float64), seed=0).double() for c in (bounded, SMALL)
    )
    x, _ = tokens(2, 12)
    want = free(x).logits_BSV
    assert not torch.equal(model(x).logits_BSV, want)
    ctx = Context(cache=model.init_cache(2, 12))
    assert_close(model(x[:, :11], ctx=ctx).logits_BSV, want[:, :11], 1e-12)
    assert_close(model(x[:, 11:], ctx=ctx).logits_BSV, want[:, 11:], 1e-12)


@pytest.mark.parametrize("change", [{}, {"window": (4,)}, {"n_kv_heads": 1}], ids=str)
def test_decoding_equals_forward(change):
    model = (
        Transformer(replace(SMALL, **change), Compute(dtype=torch.float64), seed=0).double().eval()
    )
    x, _ = tokens(2, 12)
    want = model(x).logits_BSV
    ctx = Context(cache=model.init_cache(2, 12), last_only=True)
    assert_close(model(x[:, :5], ctx=ctx).logits_BSV[:, 0], want[:, 4], 1e-12)
    for i in range(5, 12):
        assert_close(model(x[:, i : i + 1], ctx=ctx).logits_BSV[:, 0], want[:, i], 1e-12)


@pytest.mark.parametrize("change", [{}, {"window": (4,)}, {"n_kv_heads": 1}], ids=str)
def test_ragged_decoding_equals_forward(change):
    """Sequences of different lengths in one cache, prefilled together and decoded together."""
    model = Transformer(replace(SMALL, **change), Compute(dtype=torch.float64), seed=0).double()
    x, _ = tokens(3, 12)
    want = model(x).logits_BSV
    prompts = (5, 2, 4)
    ctx = Context(cache=model.init_cache(3, 14), n_new=prompts, last_only=True)
    logits = model(x[:, :5], ctx=ctx).logits_BSV[:, 0]
    for b, n in enumerate(prompts):
        assert_close(logits[b], want[b, n - 1], 1e-12)
    for step, n_new in enumerate([(1, 1, 1), (2, 2, 2), (2, 1, 2)]):
        held = ctx.cache.lengths
        width = max(n_new)
        new = torch.stack([x[b, n : n + width] for b, n in enumerate(held)])
        logits = model(new, ctx=replace(ctx, n_new=n_new)).logits_BSV[:, 0]
        for b, (n, more) in enumerate(zip(held, n_new, strict=True)):
            assert_close(logits[b], want[b, n + more - 1], 1e-12), step


def test_future_tokens_do_not_matter():
    model = Transformer(SMALL, Compute(dtype=torch.float64), seed=0).double()
    x, _ = tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 32
    assert_close(model(x).logits_BSV[:, :6], model(changed).logits_BSV[:, :6], 1e-12)


def test_documents_apart_equal_documents_alone():
    model = Transformer(
        replace(SMALL, rope_theta=100.0), Compute(dtype=torch.float64), seed=0
    ).double()
    x, _ = tokens(1, 10)
    doc = torch.tensor([[0] * 6 + [1] * 4], dtype=torch.int32)
    together = model(x, ctx=Context(doc)).logits_BSV
    # RoPE is relative, so a document that starts at position 6 reads as if it started at 0
    assert_close(together[:, 6:], model(x[:, 6:]).logits_BSV, 1e-11)


def test_statistics_come_from_the_sparse_layers_in_order():
    model = Transformer(SMALL, seed=0)
    out = model(*tokens())
    assert len(out.stats) == 2 == len(model.sparse_layers())
    assert all(s.counts_HE.sum(-1).tolist() == [2 * 9 * 2] * 2 for s in out.stats)
    dense = Transformer(replace(SMALL, moe=MoEConfig(kind="dense")), seed=0)
    assert dense(*tokens()).stats == () and dense.sparse_layers() == []


def test_bfloat16_is_near_float64():
    x, y = tokens(1, 6)
    low = Transformer(SMALL, Compute(dtype=torch.bfloat16), seed=0)
    wide = Transformer(SMALL, Compute(dtype=torch.float64), seed=0).double()
    out = low(x, y)
    assert out.nats.dtype == torch.float32
    assert_close(out.nats, wide(x, y).nats, 1e-2)


@pytest.mark.slow
def test_compiles():
    model = Transformer(SMALL, seed=0)
    x, y = tokens()
    want = model(x, y)
    want.nats.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.layers:
        block.compile(fullgraph=True)
    got = model(x, y)
    assert_close(got.nats, want.nats, 1e-5)
    got.nats.backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        assert_close(p.grad, g, 1e-4)


@pytest.mark.parametrize("change", [{}, {"tied": True, "logit_softcap": 3.0}], ids=str)
def test_log_probabilities_of_targets_take_a_weight_per_token(change):
    model = Transformer(replace(SMALL, **change), Compute(dtype=torch.float64), seed=0).double()
    x, y = tokens()
    y = y.clone()
    y[0, 3] = -1
    out = model(x, y, Context(log_probs=True))
    want = torch.log_softmax(model(x).logits_BSV, -1).gather(-1, y.clamp(min=0).unsqueeze(-1))
    want = want.squeeze(-1) * (y >= 0)
    assert_close(out.log_probs_BS, want, 1e-12)
    assert_close(out.nats, model(x, y).nats, 1e-12)
    weight = torch.rand(y.shape, dtype=torch.float64)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((weight * out.log_probs_BS).sum(), parameters)
    wanted = torch.autograd.grad((weight * want).sum(), parameters)
    for got, expected in zip(grads, wanted, strict=True):
        assert_close(got, expected, 1e-11)
