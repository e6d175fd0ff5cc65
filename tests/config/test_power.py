"""Batch and rates by the tokens of a run."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headway.config import Config, DataConfig, MeshConfig, OptimConfig, UsageError
from headway.config.check import validate
from headway.config.fill import filled
from headway.config.power import powered

BASE = OptimConfig(
    transfer="power", steps=1000, lr=1e-3, beta2=0.99, base_batch=4096, base_tokens=4_096_000
)


def _config(optim=BASE, mesh=MeshConfig(), **data) -> Config:
    return Config(
        data=replace(DataConfig(seq_len=128, batch_size=32), **data), optim=optim, mesh=mesh
    )


def _sequences(config: Config) -> int:
    data = config.data
    return (config.optim.steps - 1) * data.batch_size + (data.last_batch_size or data.batch_size)


def test_at_its_base_a_run_keeps_everything():
    config, derived = powered(_config())
    none = replace(
        BASE,
        transfer="none",
        base_batch=OptimConfig.base_batch,
        base_tokens=OptimConfig.base_tokens,
    )
    assert config == _config(none) and derived["optim.lr"].startswith("0.001: 0.001 · √(B/B0) = √1")


def test_sixteen_times_the_tokens_by_hand():
    config, derived = powered(_config(replace(BASE, steps=16_000, name="muon")))
    assert config.data.batch_size == round(32 * 16**0.383) == 93
    assert _sequences(config) == 16_000 * 32 and config.optim.steps == math.ceil(512_000 / 93)
    large = 93 / 32
    assert config.optim.lr == pytest.approx(1e-3 * math.sqrt(large))
    assert config.optim.muon_lr == pytest.approx(0.02 * math.sqrt(large))
    assert config.optim.beta2 == pytest.approx(0.99**large)
    assert config.optim.eps == pytest.approx(1e-8 * math.sqrt(16 / large))
    assert config.optim.transfer == "none" and powered(config) == (config, {})
    assert set(derived) == {f"optim.{x}" for x in ("steps", "lr", "beta2", "eps", "muon_lr")} | {
        "data.batch_size"
    }
    assert derived["data.batch_size"].startswith(
        "93: base_batch 4096 · (T/T0)^0.383, T/T0 = 65,536,000/4,096,000"
    )
    shorter, _ = powered(_config(replace(BASE, steps=10)))
    assert shorter.data.batch_size == round(32 * 0.01**0.383) == 5
    assert shorter.optim.beta2 == pytest.approx(0.99 ** (5 / 32))
    shortest, _ = powered(_config(replace(BASE, steps=1, base_batch=10**6, beta2=0.999)))
    assert shortest.optim.beta2 == 0.9999
    longest, _ = powered(_config(replace(BASE, steps=10_000_000)))
    assert longest.optim.beta2 == 0.95


def test_what_becomes_of_a_micro_batch_is_said():
    longer = replace(BASE, steps=16_000)

    def said(optim: OptimConfig, mesh=MeshConfig(), **data) -> tuple[int, str]:
        config, derived = filled(_config(optim, mesh, **data), 257)
        return config.data.micro_batch_size, derived.get("data.micro_batch_size", "")

    assert said(longer) == (
        93,
        "93: the whole batch in one pass, of 32 before; "
        "data.micro_batch_size=32 would accumulate instead",
    )
    assert said(longer, MeshConfig(dp=2))[1].endswith(
        "on each of 2 ranks, of 16 before; data.micro_batch_size=16 would accumulate instead"
    )
    assert said(longer, micro_batch_size=8) == (8, "8: as given; 12 per step, 4 before")
    for unchanged in (BASE, replace(BASE, steps=10), OptimConfig()):  # 32, fewer, 32 sequences
        assert said(unchanged)[1].endswith(": the whole batch in one pass")
        assert said(replace(unchanged, steps=1000), micro_batch_size=8) == (8, "")


@given(
    steps=st.integers(1, 3000),
    batch=st.integers(1, 12),
    last=st.integers(0, 12),
    ranks=st.sampled_from([1, 2, 4]),
    micro=st.integers(0, 3),
    base=st.integers(1, 10**7),
    small=st.integers(0, 2),
)
@example(steps=1, batch=2, last=0, ranks=2, micro=2, base=1000, small=1)
def test_tokens_are_kept_and_meshes_divide_the_batch(steps, batch, last, ranks, micro, base, small):
    unit = ranks * (micro or 1)
    # a last batch is in micro-batches, or smaller than one on every rank
    batch, last = batch * unit, min(last, batch) * unit or small * ranks % unit
    optim = replace(BASE, steps=steps, base_tokens=base)
    config = _config(
        optim, MeshConfig(dp=ranks), batch_size=batch, last_batch_size=last, micro_batch_size=micro
    )
    validate(config)
    after, _ = filled(config, 257)
    validate(after)
    assert 0 <= _sequences(config) - _sequences(after) < unit
    assert filled(after, 257)[0] == after


def test_a_base_out_of_range_is_one_line():
    with pytest.raises(UsageError, match="optim.base_tokens=0 is below 1"):
        powered(_config(replace(BASE, base_tokens=0)))


def test_moments_in_bfloat16_bound_beta2():
    optim = replace(BASE, steps=10, state_dtype="bfloat16")
    with pytest.raises(
        UsageError, match="optim.state_dtype=bfloat16 loses an average as slow as optim.beta2=0.998"
    ):
        powered(_config(optim))
