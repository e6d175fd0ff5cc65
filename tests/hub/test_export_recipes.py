"""Every recipe leaves, and Transformers reads the same model."""

from dataclasses import replace

import pytest

from headway.config import ModelConfig
from headway.recipes import RECIPES, load
from tests.command import call
from tests.hub.small_runs import write_run

pytest.importorskip("transformers", reason="--check compares with it")
FAMILIES = {"dense": "qwen3", "moe": "qwen3_moe", "cpu_step": "qwen3_moe"}
"""Recipe → what it leaves as; the others as `headway`."""


def small(model: ModelConfig) -> ModelConfig:
    """The same options at small sizes; a width of experts that 8 does not divide stays."""
    moe = replace(
        model.moe,
        n_experts=2 * model.moe.top_k,
        d_expert=min(model.moe.d_expert, 64),
        d_shared=min(model.moe.d_shared, 32),
    )
    width = 16 * model.n_heads
    return replace(model, vocab_size=320, n_layers=2, d_model=width, d_ff=64, moe=moe)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_exported(name, tmp_path):
    write_run(tmp_path / "run", small(load(name).model))
    words = ("--to", tmp_path / "hf", "--dtype", "float32", "--check", "--json")
    done = call("export", tmp_path / "run", *words)
    assert done.code == 0, done
    assert done.json["model_type"] == FAMILIES.get(name, "headway")
    assert done.json["greedy_equal"] and done.json["left_out"] == []
