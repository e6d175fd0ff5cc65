"""Recipes are valid, small differences of each other, and what they promise about their cost."""

import dataclasses
from dataclasses import replace

import pytest

from headway.config import Config, UsageError
from headway.config.check import remarks, validate
from headway.plan.cost import model_costs, total
from headway.plan.describe import with_vocab
from headway.recipes import RECIPES, load, source


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_named(name):
    config = load(name)
    assert config.recipe == name
    validate(config)
    assert remarks(config) == ()
    assert f"def {name}(" in source(name)
    assert RECIPES[name].__doc__


def test_hyphens_are_taken_for_underscores():
    assert load("multi-head-latent") == load("multi_head_latent")
    assert source("multi-head-latent") == source("multi_head_latent")


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(
        UsageError, match="unknown recipe 'multi_head_laten'; did you mean multi_head_latent"
    ):
        load("multi_head_laten")


def test_four_layers_at_equal_flops():
    """dense, moe, latent and multi_head_latent differ in their layer alone and cost the same within 3%."""
    family = [with_vocab(load(name)) for name in ("dense", "moe", "latent", "multi_head_latent")]
    costs = [total(model_costs(c, 1).flops) for c in family]
    assert max(costs) / min(costs) < 1.03
    for config in family[1:]:
        same = replace(config, recipe="dense", model=replace(config.model, moe=family[0].model.moe))
        assert same == family[0]


def test_demo_fits_its_five_minutes():
    """Work in FLOPs, evaluation included: at 50 GFLOP/s, slow for two cores, under 4.5 minutes."""
    config = with_vocab(load("demo"))
    forward = total(model_costs(config, 1).flops)
    tokens = config.optim.steps * config.data.batch_size * config.data.seq_len
    evaluations = 1 + config.optim.steps // config.run.eval_every
    evaluated = evaluations * config.run.eval_tokens
    assert forward * (3 * tokens + evaluated) < 50e9 * 270
    assert 0 < config.run.max_seconds <= 240


def test_cpu_step_is_the_shape_of_the_benchmark():
    config = load("cpu_step")
    m, moe = config.model, config.model.moe
    shape = (
        m.vocab_size,
        m.n_layers,
        m.d_model,
        m.n_heads,
        moe.kind,
        moe.n_experts,
        moe.top_k,
        moe.d_expert,
    )
    assert shape == (512, 6, 384, 6, "moe", 32, 4, 192)
    assert (config.data.seq_len, config.data.batch_size, moe.n_heads) == (256, 8, 1)


def test_recipe_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\nfrom headway import recipes\n\n"
        "def wider():\n    base = recipes.load('moe')\n"
        "    return replace(base, recipe='wider', model=replace(base.model, d_model=256))\n"
    )
    config = load(f"{file}:wider")
    assert config.recipe == "wider" and config.model.d_model == 256 and isinstance(config, Config)
    assert dataclasses.replace(config, recipe="moe", model=load("moe").model) == load("moe")
    assert "def wider" in source(f"{file}:wider")
