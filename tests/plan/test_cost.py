"""Formulas of parameters and FLOPs against the built model and torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, RouterConfig
from headway.model.costs import CostGroup
from headway.model.mixers.attention import mean_keys
from headway.model.transformer import Transformer
from headway.plan.cost import ModelCosts, model_costs, total
from headway.plan.describe import with_vocab
from headway.recipes import RECIPES
from headway.train.resolve import Sizes
from tests.plan.test_memory import MODELS

B, S = 2, 32


def costs_of(model: ModelConfig) -> ModelCosts:
    return model_costs(Config(model=model, data=DataConfig(seq_len=S)), B)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_built_model(name):
    costs = costs_of(MODELS[name])
    model = Transformer(MODELS[name], seed=0)
    assert total(costs.parameters) == sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for layer in model.sparse_layers() for p in layer.experts.parameters())
    moe = MODELS[name].moe
    used = total(costs.parameters) - idle * (moe.n_experts - moe.top_k) // moe.n_experts
    assert total(costs.active) == used


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_of_every_recipe(recipe):
    """Built without memory, on the meta device, at full size."""
    config = with_vocab(RECIPES[recipe]())
    with torch.device("meta"):
        model = Transformer(config.model)
    costs = model_costs(config, 1)
    assert total(costs.parameters) == sum(p.numel() for p in model.parameters())
    assert sum(weights.count for weights in costs.weights) == total(costs.parameters)
    sizes = Sizes.of(model, config.data.seq_len)
    assert (sizes.total, sizes.active) == (total(costs.parameters), total(costs.active))
    assert sizes.flops_per_token == costs.training_flops


def expert_flops(x_shape, gate_shape, w_in_shape, w_out_shape, token_shape, *_, **__) -> int:
    """Two matmuls per sorted row, from the shapes of the tensors: `[L] × [L, G·F]` and `[F] × [F, L]`."""
    _, _, G, F, L = w_in_shape
    return 2 * token_shape[0] * (L * G * F + F * L)


def attention_flops(q_shape, *_, **__) -> int:
    """Two matmuls of every query with every key, causal or not, as torch counts SDPA."""
    B, S, N, d = q_shape
    return 4 * B * N * S * S * d


def attention_backward_flops(d_out_shape, *_, **__) -> int:
    """Twice the forward, as for every matmul; recomputed scores are not useful work."""
    return 2 * attention_flops(d_out_shape)


def counted(model: Transformer, backward: bool) -> int:
    mapping = {
        torch.ops.headway.experts: expert_flops,
        torch.ops.headway.attention: attention_flops,
        torch.ops.headway.attention_backward: attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    tokens = torch.randint(0, model.config.vocab_size, (B, S))
    # the plain form of attention, whose matmuls the counter knows
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = model(tokens, tokens if backward else None)
        if backward:
            out.nats.backward()
    return counter.get_total_flops()


def formula_of_counter(config) -> float:
    """The forward formula per token, with attention over whole sequences, as torch counts it."""
    costs, layers = costs_of(config), config.n_layers
    scores = costs.flops_of(CostGroup.SCORES)
    assert scores > 0
    whole = 4 * config.n_heads * config.head_width * S * layers
    return total(costs.flops) - scores + whole


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_equal_the_counter(name):
    assert formula_of_counter(MODELS[name]) * B * S == counted(
        Transformer(MODELS[name], seed=0).eval(), False
    ) + noise(MODELS[name])


def noise(config) -> float:
    """The noise projection runs in training only."""
    routers = B * S * costs_of(config).flops_of(CostGroup.ROUTERS)
    return routers / 2 if config.moe.router.noisy else 0


@pytest.mark.parametrize("name", ["relu2, no QK-norm, tied", "dense", "dense, gate, window"])
def test_training_is_three_times_forward(name):
    model = Transformer(MODELS[name], seed=0)
    assert counted(model, True) == 3 * counted(model, False)


# biases of experts are multiplied, see there
@pytest.mark.parametrize("name", [name for name in MODELS if not MODELS[name].moe.expert_bias])
def test_the_loop_counts_what_the_built_model_multiplies(name):
    """6 per entry of the matrices that a token visits; the scores of the keys that it sees."""
    config = MODELS[name]
    model = Transformer(config, seed=0)
    named = model.named_parameters()  # norms and biases of heads multiply nothing
    unused = sum(p.numel() for n, p in named if p.ndim < 2 or "norm" in n or "bias" in n)
    unused += 0 if config.tied else model.embed.weight.numel()
    windows = [config.window_of(layer) for layer in range(config.n_layers)]
    keys = sum(
        sum(min(i, w or S) for i in range(1, S + 1)) / S for w in windows
    )  # position i sees i of them, or its window
    sizes = Sizes.of(model, S)
    multiplied = 6 * (sizes.active - unused) + 12 * config.n_heads * config.head_width * keys
    assert sizes.flops_per_token == multiplied


def test_attention_sees_half_the_keys():
    assert mean_keys(8, 0) == 4.5
    assert mean_keys(8, 8) == mean_keys(8, 100) == 4.5
    assert mean_keys(8, 2) == (1 + 7 * 2) / 8
    assert mean_keys(8, 1) == 1


def test_experts_are_what_flat_moe_has():
    """Multi-Head LatentMoE with D_L = D has the experts of the flat mixture and pays 4·D² FLOPs for its projections."""
    heads = replace(
        MODELS["multi-head latent"], moe=MoEConfig(n_heads=4, n_experts=8, top_k=3, d_expert=20)
    )
    flat = replace(heads, moe=replace(heads.moe, kind="moe", n_heads=1))
    a, b = ({i.part: i.value for i in costs_of(c).flops} for c in (heads, flat))
    for group in (CostGroup.EXPERTS, CostGroup.ROUTERS):
        assert a[group] == b[group]
    assert sum(a.values()) - sum(b.values()) == 4 * 32 * 32 * heads.n_layers


def test_router_that_reads_the_token_is_wider():
    sub, token = (
        replace(
            MODELS["multi-head latent"],
            moe=replace(MODELS["multi-head latent"].moe, router=RouterConfig(reads=r)),
        )
        for r in ("sub_token", "token")
    )
    a, b = (
        {i.part: i.value for i in costs_of(c).parameters}[CostGroup.ROUTERS] for c in (sub, token)
    )
    assert b == 2 * a  # two heads: D is twice L
