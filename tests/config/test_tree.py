"""A valid config builds; an invalid one gives one line that names both values."""

import dataclasses
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from headway.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
    RunConfig,
    UsageError,
    from_dict,
)
from headway.config.check import remarks, validate
from headway.model.transformer import Transformer

MOE = MoEConfig(n_experts=8, top_k=2, d_expert=16, n_heads=8)
MODEL = ModelConfig(vocab_size=64, n_layers=2, d_model=64, n_heads=4, moe=MOE)
BASE = Config(model=MODEL)


def model(**changes):
    return replace(BASE, model=replace(MODEL, **changes))


def moe(**changes):
    return model(moe=replace(MOE, **changes))


MISTAKES = {
    "n_heads=5 must divide model.d_model=64; use n_heads=2 or 4": model(n_heads=5),
    "head of width 3": model(d_head=3),
    "n_kv_heads=3 must divide model.n_heads=4; use n_kv_heads=2 or 4": model(n_kv_heads=3),
    "model.qk_norm=True is not known; use none, head or all": model(qk_norm=True),
    "model.rope.scaling=ntk is not known": model(rope=RopeConfig(scaling="ntk")),  # type: ignore
    "rotary_dim=18 must be even and at most 16": model(rope=RopeConfig(rotary_dim=18)),
    "rotary_dim=3 must be even": model(rope=RopeConfig(rotary_dim=3)),
    "model.rope.factor=2.0 has no effect with scaling=none": model(rope=RopeConfig(factor=2.0)),
    "mscale=1.0 has no effect with scaling=linear": model(
        rope=RopeConfig(scaling="linear", mscale=1.0)
    ),
    "model.rope.original_max_len=0 is below 1": model(rope=RopeConfig(scaling="llama3")),
    "low_freq_factor=4.0 must lie below high_freq_factor=4.0; use 1 and 4": model(
        rope=RopeConfig(scaling="llama3", original_max_len=64, low_freq_factor=4.0)
    ),
    "rope_theta=1.0 with scaling=yarn": model(
        rope=RopeConfig(scaling="yarn", original_max_len=64), rope_theta=1.0
    ),
    "model.mixer=mamba is not known": model(mixer="mamba"),  # type: ignore
    "model.mla is set and model.mixer=attention": model(mla=MLAConfig(q_lora_rank=3)),
    "model.n_kv_heads=2 has no effect with model.mixer=mla; use 0": model(
        mixer="mla", n_kv_heads=2
    ),
    "model.sinks=True has no effect with model.mixer=mla": model(mixer="mla", sinks=True),
    "rope.rotary_dim=2 has no effect": model(mixer="mla", rope=RopeConfig(rotary_dim=2)),
    "qk_rope_head_dim=3 must be even": model(mixer="mla", mla=MLAConfig(qk_rope_head_dim=3)),
    "v_head_dim=9 exceeds the 8 dims": model(
        mixer="mla", mla=MLAConfig(qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=9)
    ),
    "mla.kv_lora_rank=0 is below 1": model(mixer="mla", mla=MLAConfig(kv_lora_rank=0)),
    "clip_qkv=-1.0 is below 0": model(clip_qkv=-1.0),
    "n_layers=0 is below 1": model(n_layers=0),
    "model.window=4 -1 has an entry below 0": model(window=(4, -1)),
    "window has 3 entries and model.n_layers=2": model(window=(1, 2, 3)),
    "rope_theta=0.0 is not above 0": model(rope_theta=0.0),
    "logit_softcap=nan": model(logit_softcap=float("nan")),
    "d_ff=0 is below 1": model(d_ff=0, moe=MoEConfig(kind="dense")),
    "top_k=9 must lie between 1 and n_experts=8": moe(top_k=9),
    "top_k=1 with gate='topk_softmax'": moe(top_k=1),
    "renormalize=True makes every gate 1": moe(
        top_k=1, router=RouterConfig(gate="softmax_topk", renormalize=True)
    ),
    "jitter=1.5": moe(router=RouterConfig(jitter=1.5)),
    "scale=nan": moe(router=RouterConfig(scale=float("nan"))),
    "scale=inf": moe(router=RouterConfig(scale=float("inf"))),
    "n_heads=3 must divide the latent width 64; use n_heads=2 or 4": moe(n_heads=3),
    "n_heads=8 needs kind=multi_head_latent, and kind=latent": moe(kind="latent"),
    "has no effect with kind=moe": moe(kind="moe", n_heads=1, d_latent=32),
    "n_dense_layers=3 exceeds model.n_layers=2": moe(n_dense_layers=3),
    "n_groups=3 must divide the 8 choices of a router; use n_groups=2 or 4": moe(
        router=RouterConfig(n_groups=3)
    ),
    "top_k_groups=3 exceeds 2: 2 groups of 4": moe(router=RouterConfig(n_groups=2, top_k_groups=3)),
    "group_best=5 exceeds 4": moe(router=RouterConfig(n_groups=2, group_best=5)),
    "group_best=2 has no effect with n_groups=1": moe(router=RouterConfig(group_best=2)),
    "top_k=2 exceeds the 1 experts of top_k_groups=1": moe(router=RouterConfig(n_groups=8)),
    "bias=quantile knows no groups": moe(
        router=RouterConfig(n_groups=2), balance=BalanceConfig(bias="quantile")
    ),
    "float8 takes neither expert_bias=True nor": moe(expert_bias=True, precision="float8"),
    "activation=swiglu_clamped; use bfloat16": moe(activation="swiglu_clamped", precision="float8"),
    "dense_layers names layer 2 and model.n_layers=2; use layers from 0 to 1": moe(
        dense_layers=(0, 2)
    ),
    "sparse_step=0 is below 1": moe(sparse_step=0),
    "shared_gate=True has no effect with d_shared=0": moe(shared_gate=True),
    "d_ff=-1 is below 1": model(d_ff=-1, moe=replace(MOE, dense_layers=(1,))),
    "capacity_factor=-1.0 is below 0": moe(capacity_factor=-1.0),
    "balance.aux_scope=micro_batch is not known": moe(
        balance=BalanceConfig(aux_scope="micro_batch")  # type: ignore[arg-type]
    ),
    "mesh.chunks=2 cuts sequences, of which a micro-batch has 1": replace(
        moe(capacity_factor=1.0),
        mesh=MeshConfig(dp=2, chunks=2),
        data=DataConfig(micro_batch_size=1),
    ),
    "and model.moe.balance.aux_scope=sequence counts by sequence; use mesh.chunks=2": replace(
        moe(balance=BalanceConfig(aux_scope="sequence")), mesh=MeshConfig(dp=4, chunks=4)
    ),
    "balance.aux=-0.1 is below 0": moe(balance=BalanceConfig(aux=-0.1)),
    "bias_rate=0.0 is not above 0": moe(balance=BalanceConfig(bias_rate=0.0)),
    "mesh needs hp=3 to divide n_heads=8; use hp=1, 2, 4 or 8": replace(
        BASE, mesh=MeshConfig(hp=3)
    ),
    "mesh needs ep=3 to divide n_experts=8": replace(BASE, mesh=MeshConfig(ep=3)),
    "a mesh of 3 ranks must divide batch_size=8": replace(BASE, mesh=MeshConfig(dp=3)),
    "4 ranks × micro_batch_size=4 must divide batch_size=8": replace(
        BASE, mesh=MeshConfig(dp=4), data=DataConfig(micro_batch_size=4)
    ),
    "more ranks go to ep or dp": replace(BASE, mesh=MeshConfig(hp=64)),
    "kind=dense has none": replace(moe(kind="dense"), mesh=MeshConfig(ep=2)),
    "mesh.chunks=5 is outside 0 to 4": replace(BASE, mesh=MeshConfig(chunks=5)),
    "mesh.timeout=0": replace(BASE, mesh=MeshConfig(timeout=0)),
    "the collectives are not traced": replace(
        BASE, mesh=MeshConfig(dp=2), run=RunConfig(compile=True)
    ),
    "shares the heads": replace(moe(kind="moe", n_heads=1), mesh=MeshConfig(hp=2)),
    "mesh.dp=0 is below 1": replace(BASE, mesh=MeshConfig(dp=0)),
    "micro_batch_size=3 must divide data.batch_size=8; use 1, 2, 4 or 8": replace(
        BASE, data=DataConfig(micro_batch_size=3)
    ),
    "val_fraction": replace(BASE, data=DataConfig(val_fraction=1.0)),
    "seq_len": replace(BASE, data=DataConfig(seq_len=0)),
    "data.source is empty": replace(BASE, data=DataConfig(source=())),
    "2 weights for 1 source": replace(BASE, data=DataConfig(weights=(1.0, 2.0))),
    "optim.steps=0 is below 1": replace(BASE, optim=OptimConfig(steps=0)),
    "optim.warmup=1.0 is outside": replace(BASE, optim=OptimConfig(warmup=1.0)),
    "optim.decay=0.99 does not fit beside optim.warmup=0.02": replace(
        BASE, optim=OptimConfig(decay=0.99)
    ),
    "optim.lr=nan is not above 0": replace(BASE, optim=OptimConfig(lr=float("nan"))),
    "optim.beta2=1.0 is outside": replace(BASE, optim=OptimConfig(beta2=1.0)),
    "optim.state_dtype=bfloat16": replace(
        BASE, optim=OptimConfig(state_dtype="bfloat16", beta2=0.999)
    ),
    "optim.max_skipped=0 is below 1": replace(BASE, optim=OptimConfig(max_skipped=0)),
    "run.log_every=0 is below 1": replace(BASE, run=RunConfig(log_every=0)),
    "run.keep_checkpoints=0 is below 1": replace(BASE, run=RunConfig(keep_checkpoints=0)),
    "run.max_seconds=-1 is below 0": replace(BASE, run=RunConfig(max_seconds=-1)),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        validate(MISTAKES[text])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 220


def test_derived_values_say_where_they_come_from():
    assert validate(BASE) == {
        "model.d_head": "16: d_model 64 / n_heads 4",
        "model.n_kv_heads": "4: as many as n_heads",
        "model.moe.d_latent": "64: as wide as d_model",
        "model.moe.router.reads": "sub_token: as published for Multi-Head LatentMoE",
        "width of a latent head": "8: d_latent 64 / n_heads 8",
    }
    assert validate(model(d_head=16, n_kv_heads=2, moe=MoEConfig(kind="dense"))) == {}


def test_two_balance_rules_are_remarked_on():
    both = moe(balance=BalanceConfig(bias="sign", aux=0.01))
    assert len(remarks(both)) == 1 and "aux=0.01" in remarks(both)[0]
    assert remarks(moe(balance=BalanceConfig(bias="sign", aux=0.0))) == ()


def test_dict_round_trip_and_unknown_fields():
    config = model(window=(4, 0), n_kv_heads=2)
    assert from_dict(Config, config.to_dict()) == config
    with pytest.raises(UsageError, match="no field 'd_modle'"):
        from_dict(ModelConfig, {"d_modle": 3})


def test_values_of_former_versions():
    for former, today in ((True, "head"), (False, "none"), ("all", "all")):
        assert from_dict(ModelConfig, {"qk_norm": former}).qk_norm == today


def test_every_leaf_has_a_docstring():
    """`--help` is made from them."""
    import ast
    import inspect

    import headway.config

    for node in ast.parse(inspect.getsource(headway.config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for first, second in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(first, ast.AnnAssign):
                text = second.value.value if isinstance(second, ast.Expr) else ""  # type: ignore[union-attr]
                assert isinstance(text, str) and len(text) > 5, (
                    f"{node.name}.{first.target.id} has no docstring"
                )  # type: ignore[union-attr]


small = st.integers(1, 6)

routers = st.builds(
    RouterConfig,
    gate=st.sampled_from(["softmax_topk", "topk_softmax", "sigmoid"]),
    renormalize=st.booleans(),
    scale=st.sampled_from([0.5, 1.0, 5.0]),
    reads=st.sampled_from(["sub_token", "token"]),
    noisy=st.booleans(),
    logit_bias=st.booleans(),
    n_groups=st.sampled_from([1, 1, 2, 3]),
    top_k_groups=st.integers(1, 2),
    group_best=st.sampled_from([1, 1, 2]),
    jitter=st.sampled_from([0.0, 0.1]),
)
moes = st.builds(
    MoEConfig,
    kind=st.sampled_from(["dense", "moe", "latent", "multi_head_latent"]),
    n_experts=small,
    top_k=small,
    d_expert=small,
    n_heads=st.sampled_from([1, 1, 2, 3]),
    d_latent=st.sampled_from([0, 0, 6, 8]),
    activation=st.sampled_from(["swiglu", "relu2", "gelu", "swiglu_clamped"]),
    expert_bias=st.booleans(),
    d_shared=st.integers(0, 4),
    latent_norm=st.booleans(),
    capacity_factor=st.sampled_from([0.0, 1.0]),
    n_dense_layers=st.integers(0, 2),
    sparse_step=st.integers(1, 2),
    dense_layers=st.sampled_from([(), (0,), (1,)]),
    shared_gate=st.booleans(),
    router=routers,
    balance=st.builds(BalanceConfig, bias=st.sampled_from(["none", "sign", "quantile"])),
)
models = st.builds(
    ModelConfig,
    mixer=st.sampled_from(["attention", "attention", "mla"]),
    vocab_size=st.just(16),
    n_layers=st.integers(1, 2),
    d_model=st.sampled_from([6, 8, 12]),
    n_heads=st.integers(1, 4),
    n_kv_heads=st.integers(0, 4),
    d_head=st.sampled_from([0, 0, 4, 5]),
    window=st.sampled_from([(), (0,), (3,), (2, 0)]),
    qk_norm=st.sampled_from(["none", "head", "all"]),
    rope=st.builds(RopeConfig, rotary_dim=st.sampled_from([0, 0, 2, 3]), interleaved=st.booleans()),
    clip_qkv=st.sampled_from([0.0, 0.5]),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    sinks=st.booleans(),
    attn_gate=st.booleans(),
    tied=st.booleans(),
    d_ff=small,
    moe=moes,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(models)
def test_what_validate_accepts_builds_and_what_it_refuses_is_one_line(architecture):
    config = Config(model=architecture)
    try:
        validate(config)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 220
        return
    network = Transformer(architecture, seed=0)
    tokens = torch.arange(8).view(2, 4) % 16
    out = network(tokens, tokens)
    out.nats.backward()
    assert out.nats.item() == pytest.approx(8 * torch.log(torch.tensor(16.0)).item(), rel=0.2)
    assert len(out.stats) == len(network.sparse_layers())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 64), st.integers(1, 64))
def test_the_fix_for_a_mesh_works(heads, hp):
    """Every size that the message proposes divides."""
    assume(heads % hp)
    d_latent = heads * 2
    config = replace(
        BASE,
        model=replace(MODEL, moe=replace(MOE, n_heads=heads, d_latent=d_latent)),
        mesh=MeshConfig(hp=hp),
    )
    with pytest.raises(UsageError) as caught:
        validate(config)
    proposed = (
        str(caught.value)
        .rpartition("use hp=")[2]
        .partition(";")[0]
        .replace(" or ", ", ")
        .replace(", …", "")
    )
    assert all(heads % int(n) == 0 for n in proposed.split(", "))


@given(st.integers(0, 3), st.integers(1, 4), st.sets(st.integers(0, 7)))
def test_which_layers_are_sparse(first, step, dense):
    """As in Qwen2-MoE and, for the first layers, DeepSeek."""
    sparse = MoEConfig(n_dense_layers=first, sparse_step=step, dense_layers=tuple(dense))
    config = replace(MODEL, n_layers=8, moe=sparse)
    for i in range(8):
        theirs = (i not in dense) and (i + 1) % step == 0 and i >= first
        assert config.is_sparse(i) == theirs
    assert config.n_sparse == sum(map(config.is_sparse, range(8)))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.run.seed = 3  # type: ignore[misc]
