"""Latent attention: the definition, its two forms, caches, and Transformers' modules."""

import pytest
import torch

from headway.config import MLAConfig, ModelConfig, RopeConfig
from headway.kernels.rope import rope_tables
from headway.model.compute import Compute
from headway.model.context import Context, DenseCache
from headway.model.init import init_weights
from headway.model.mixers.mla import MLA
from headway.model.packing import pack_
from headway.model.paged import PagedCache, Segment
from headway.model.transformer import Transformer
from tests.compare import assert_close
from tests.model.mixers.attention_reference import normed, rotated

CPU = torch.device("cpu")
YARN = RopeConfig(
    scaling="yarn",
    factor=4.0,
    original_max_len=32,
    mscale=0.7,
    mscale_all_dim=1.0,
    interleaved=True,
)
OPTIONS = [
    {},
    {"q_lora_rank": 0},
    {"v_head_dim": 10, "rope": RopeConfig(interleaved=True)},
    {"rope": YARN, "qkv_bias": True, "o_bias": True},
]


def config(**options) -> ModelConfig:
    sizes = {"q_lora_rank": 7, "kv_lora_rank": 9, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
    mla = {**sizes, "v_head_dim": 5}
    mla |= {name: options.pop(name) for name in list(options) if name in mla}
    return ModelConfig(d_model=16, n_heads=3, mixer="mla", mla=MLAConfig(**mla), **options)


def build(window=0, **options):
    layer = MLA(config(**options), window).double()
    init_weights(layer, seed=0)
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() == 1:  # norms and biases
                p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return layer


def linear(layer, x):
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def reference(layer: MLA, x, mask_SS):
    """By the equations, head by head."""
    c, N = layer.config.mla, layer.config.n_heads
    n, r, C = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    low = x
    if layer.q_a is not None:
        low = normed(linear(layer.q_a, x), layer.q_a_norm.weight, 1e-6)
    q = linear(layer.q_b, low).unflatten(-1, (N, n + r))
    latent = linear(layer.kv_a, x)
    kv = linear(layer.kv_b, normed(latent[..., :C], layer.kv_a_norm.weight, 1e-6))
    kv = kv.unflatten(-1, (N, -1))
    k_rope = rotated(latent[..., None, C:], layer.config)[:, :, 0]
    q_rope = rotated(q[..., n:], layer.config)
    scale = (n + r) ** -0.5
    if layer.config.rope.mscale_all_dim:
        scale *= (1 + 0.1 * torch.log(torch.tensor(4.0, dtype=torch.float64))) ** 2
    heads = []
    for h in range(N):
        score = q[:, :, h, :n] @ kv[:, :, h, :n].transpose(1, 2)
        score = scale * (score + q_rope[:, :, h] @ k_rope.transpose(1, 2))
        weight = torch.softmax(score.masked_fill(~mask_SS, -torch.inf), -1)
        heads.append(weight @ kv[:, :, h, n:])
    return linear(layer.o, torch.cat(heads, -1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("window", [0, 3])
def test_equals_the_definition_with_gradient(options, window):
    layer = build(window, **dict(options))
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    seen = [[j <= i and (not window or j > i - window) for j in range(7)] for i in range(7)]
    got, want = layer(x), reference(layer, x, torch.tensor(seen))
    assert_close(got, want, 1e-12)
    d_out, inputs = torch.randn_like(got), [x, *layer.parameters()]
    grads = (torch.autograd.grad(y, inputs, d_out) for y in (got, want))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("window", [0, 3])
@torch.no_grad()
def test_absorbed_steps_equal_the_naive_form(options, window):
    layer = build(window, **dict(options))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = layer(x)
    state = layer.init_state(2, 9, torch.float64, x.device)
    assert state.latent.shape == (2, 9, 9 + 4)  # C + r, and nothing else
    cache, parts = DenseCache([state], 2), []
    for begin, end in ((0, 4), (4, 5), (5, 7), (7, 8), (8, 9)):
        parts.append(layer(x[:, begin:end], Context(cache=cache)))
        cache.advance([end - begin] * 2)
    assert_close(torch.cat(parts, 1), want, 1e-12)


@torch.no_grad()
def test_sequences_of_different_lengths_and_pages():
    layer = build(5)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    want = layer(x)
    cache = DenseCache([layer.init_state(2, 41, torch.float64, CPU)], 2)
    layer(x[:, :6], Context(cache=cache))
    cache.advance([6, 4])  # two tokens of the second are padding
    step = torch.stack((x[0, 6], x[1, 4])).unsqueeze(1)
    out = layer(step, Context(cache=cache))
    assert_close(out[:, 0], torch.stack((want[0, 6], want[1, 4])), 1e-12)
    pages = layer.init_pages(7, torch.float64, CPU)
    assert pages.bytes == 7 * 16 * 13 * 8
    where = ([6, 1, 3], [2, 5, 0])
    done = [0, 0]
    for lengths in ((17, 1), (1, 20), (20, 1), (2, 18)):
        segments = [Segment(done[i], n, {5: where[i]}) for i, n in enumerate(lengths)]
        new = [x[i, done[i] : done[i] + n] for i, n in enumerate(lengths)]
        expected = [want[i, done[i] : done[i] + n] for i, n in enumerate(lengths)]
        out = layer(torch.cat(new)[None], Context(cache=PagedCache([pages], segments)))
        assert_close(out[0], torch.cat(expected), 1e-12)
        done = [a + b for a, b in zip(done, lengths, strict=True)]
    pages.copy_page(3, 4)
    assert torch.equal(pages.data[4], pages.data[3]) and pages.data[3].any()


@torch.no_grad()
def test_documents_do_not_see_each_other():
    layer, x = build(), torch.randn(1, 8, 16, dtype=torch.float64)
    doc = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]], dtype=torch.int32)
    changed = x.clone()
    changed[:, :3] += 1
    assert torch.equal(layer(changed, Context(doc))[:, 3:], layer(x, Context(doc))[:, 3:])
    assert not torch.equal(layer(changed)[:, 3:], layer(x)[:, 3:])


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_a_model_decodes_what_it_computes_whole(packed):
    sizes = {"vocab_size": 32, "n_layers": 2, "window": (0, 4)}
    model = Transformer(config(rope=YARN, **sizes), Compute(), seed=0).eval()
    tokens = torch.randint(32, (1, 12))
    want = Transformer(config(rope=YARN, **sizes), Compute(torch.float64), seed=0).double()
    want = want.eval()(tokens).logits_BSV
    if packed:
        pack_(model, torch.float32)
    assert_close(model(tokens).logits_BSV, want, 1e-5)
    cache = model.init_cache(1, 12)
    steps = [model(part, ctx=Context(cache=cache)).logits_BSV for part in tokens.split(1, 1)]
    assert_close(torch.cat(steps, 1), want, 1e-5)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("scaling", ["default", "yarn"])
@torch.no_grad()
def test_equals_transformers(version, q_lora_rank, scaling):
    pytest.importorskip("transformers")
    if version == 2:
        from transformers.models.deepseek_v2 import DeepseekV2Config as Config
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module

        attention, embedding = module.DeepseekV2Attention, module.DeepseekV2RotaryEmbedding
    else:
        from transformers.models.deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

        attention, embedding = module.DeepseekV3Attention, module.DeepseekV3RotaryEmbedding
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    parameters = {"rope_theta": 1e4, "rope_type": scaling}
    rope = RopeConfig(interleaved=True)
    if scaling == "yarn":
        yarn = {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0}
        parameters |= {"original_max_position_embeddings": 64, **yarn}
        rope = RopeConfig(scaling="yarn", original_max_len=64, interleaved=True, **yarn)
    theirs_config = Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_lora_rank,
        rope_parameters=parameters,
        max_position_embeddings=512,
        attn_implementation="eager",
        **sizes,
    )
    theirs = attention(theirs_config, 0).eval()
    mla = MLAConfig(q_lora_rank=q_lora_rank or 0, **sizes)
    ours = MLA(ModelConfig(d_model=64, n_heads=4, mixer="mla", mla=mla, rope=rope)).eval()
    names = {
        "q_a_proj": "q_a",
        "q_a_layernorm": "q_a_norm",
        "q_b_proj": "q_b",
        "q_proj": "q_b",
        "kv_a_proj_with_mqa": "kv_a",
        "kv_a_layernorm": "kv_a_norm",
        "kv_b_proj": "kv_b",
        "o_proj": "o",
    }
    for name, p in theirs.named_parameters():
        p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5 + (p.dim() == 1))
        ours.get_parameter(f"{names[name.split('.')[0]]}.weight").copy_(p)
    x = torch.randn(2, 20, 64)
    where = torch.arange(20).unsqueeze(0)
    tables = embedding(theirs_config)(x, where)
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    want = theirs(x, position_embeddings=tables, attention_mask=mask)[0]
    assert_close(ours(x), want, 1e-5)


def test_tables_are_those_of_the_rotated_dims():
    layer = build()
    positions = Context().positions_of(torch.zeros(1, 5, 16, dtype=torch.float64))
    cos, _ = positions.rope(layer.config, torch.float64)
    assert torch.equal(cos, rope_tables(torch.arange(5), 4, 1e4, torch.float64)[0])
