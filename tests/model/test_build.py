"""Slots: modules of a user's own in a model, and the promise that every mixer keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, UsageError
from headway.hub.load import load_model
from headway.model.build import build_block
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.costs import Workload, active_parameters, costs_of, flops, parameters, total
from headway.model.roles import roles_of
from headway.model.transformer import Transformer
from headway.plan.choose import rank_meshes
from headway.plan.machine import MACHINES
from headway.plan.setting import Setting
from headway.train.loop import train
from tests.compare import assert_close
from tests.model.own_modules import RunningMean, TwoLanes, own_blocks
from tests.train.tiny_run import tiny

SMALL = ModelConfig(
    vocab_size=32,
    n_layers=2,
    d_model=16,
    n_heads=2,
    d_ff=24,
    moe=MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=8, n_dense_layers=1),
)
DOUBLE = Compute(torch.float64)


def own_mixer(config, layer, compute):
    return build_block(config, layer, compute, mixer=RunningMean(config))


@pytest.mark.parametrize(
    "config, blocks",
    [
        (SMALL, build_block),
        (replace(SMALL, window=(3, 0)), build_block),
        (replace(SMALL, n_kv_heads=1, attn_gate=True, qk_norm="none"), build_block),
        (SMALL, own_mixer),
        (SMALL, own_blocks),
    ],
    ids=["attention", "windows", "grouped, gated", "own mixer", "own mixer, experts, residual"],
)
def test_prefill_and_decoding_equal_one_forward_pass(config, blocks):
    model = Transformer(config, DOUBLE, seed=0, blocks=blocks).double().eval()
    x = torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(0))
    want = model(x).logits_BSV
    ctx = Context(cache=model.init_cache(3, 11))
    parts = [model(x[:, a:b], ctx=ctx).logits_BSV for a, b in ((0, 6), (6, 7), (7, 10), (10, 11))]
    assert_close(torch.cat(parts, 1), want, 1e-12)


def test_modules_of_ones_own_train_and_sample(tmp_path):
    """A mixer, experts and a residual that live in a test file, through the training loop."""
    lines = []
    result = train(tiny(tmp_path), blocks=own_blocks, log=lines.append)
    assert result["steps"] == tiny(tmp_path).optim.steps and result["sample"] is not None
    assert result["val_bits_per_byte"] < result["first_val_bits_per_byte"]
    run = Path(result["checkpoint"]).parents[1]
    loaded = load_model(run, blocks=own_blocks).model
    assert isinstance(loaded.blocks()[0].mixer, RunningMean)
    with pytest.raises(UsageError, match="modules of your own need blocks="):
        load_model(run)


def test_every_parameter_has_a_role_and_one_without_is_named():
    model = Transformer(SMALL, blocks=own_blocks)
    roles = roles_of(model)
    tensors = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert set(roles) == tensors

    class Nameless(TwoLanes):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(2))

    def blocks(config, layer, compute):
        return build_block(config, layer, compute, residual=Nameless)

    with pytest.raises(UsageError, match=r"layers.0.residual1.mix has no role.*roles.*Nameless"):
        Transformer(SMALL, blocks=blocks)


def test_a_block_in_several_places_has_its_parameters_once_and_computes_in_each():
    sparse = replace(SMALL, moe=replace(SMALL.moe, n_dense_layers=0))
    block = build_block(sparse, 0, DOUBLE)
    looped = Transformer(sparse, DOUBLE, blocks=lambda *_: block)
    once, twice = Transformer(replace(sparse, n_layers=1), DOUBLE), Transformer(sparse, DOUBLE)
    work = Workload(seq_len=5)
    for model, quantities in ((once, (parameters, active_parameters)), (twice, (flops,))):
        for quantity in quantities:
            costs, other = costs_of(looped, work), costs_of(model, work)
            assert total(costs, quantity) == total(other, quantity)
    assert total(costs_of(once, work), active_parameters) < total(costs_of(once, work), parameters)


def test_modules_of_ones_own_are_planned():
    """Every mesh, from the costs that the modules declare; one without costs is named."""
    config = Config(recipe="own", model=SMALL, data=DataConfig(seq_len=16, batch_size=8))
    setting = Setting(config, MACHINES["h100"], blocks=own_blocks)
    meshes = {row["mesh"]: row for row in rank_meshes(setting, 2)["meshes"]}
    assert len(meshes) == 3 and all(row["step_seconds"] > 0 for row in meshes.values())
    counted = sum(p.numel() for p in Transformer(SMALL, blocks=own_blocks).parameters())
    costs = setting.costs(8)
    assert sum(item.value for item in costs.parameters) == counted

    class Silent(nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

    def blocks(config, layer, compute):
        return build_block(config, layer, compute, mixer=Silent(RunningMean(config)))

    with pytest.raises(UsageError, match="Silent does not say what it costs"):
        Setting(config, MACHINES["h100"], blocks=blocks).costs(8)
