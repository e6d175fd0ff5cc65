"""Plans of experiments: what is equal in all arms, and configs that name their runs."""

import hashlib
import json
from dataclasses import replace
from functools import partial

import pytest

from headway.config import Config, UsageError, leaves, with_leaf
from headway.lab.experiment import Arm, Experiment
from headway.lab.folder import ADDED, ELSEWHERE
from headway.lab.match import match, measure
from headway.lab.runs import batches_sha256, config_hash, execute
from headway.train.budget import Budget
from tests.train.tiny_run import quiet, tiny


def double_head(model):
    model.head.weight.mul_(2.0)


def halve_head(model):
    model.head.weight.mul_(0.5)


@pytest.fixture
def config(tmp_path):
    return tiny(tmp_path, run={"max_seconds": 3.0, "stop_bits_per_byte": 9.0, "sample_tokens": 5})


def planned(config, **options):
    arms = (
        Arm("a", config),
        Arm("b", with_leaf(with_leaf(config, "model.moe.d_expert", 8), "model.moe.n_experts", 8)),
    )
    return Experiment(
        **{"arms": arms, "seeds": (0, 1), "budget": Budget(steps=300), **options}
    ).plan(quiet)


def test_nothing_ends_a_run_but_its_budget(config):
    for arm in planned(config):
        run = arm.config.run
        assert (run.max_seconds, run.stop_bits_per_byte, run.sample_tokens, run.eval_tokens) == (
            0,
            0,
            0,
            0,
        )
        assert run.threads == 1


def test_rates_by_the_tokens_of_a_run_are_refused(config):
    """They would be those of the recipe's steps, and the batch another than the other arms'."""
    power = with_leaf(config, "optim.transfer", "power")
    with pytest.raises(UsageError, match="transfer=power of tiny follows .* rates for 300 steps"):
        planned(config, arms=(Arm("a", config), Arm("power", power)))


def test_evaluations_are_spread_over_a_run(config):
    ends = {n: planned(config, evaluations=n, budget=Budget(steps=600))[0] for n in (1, 3, 100)}
    assert {n: arm.config.run.eval_every for n, arm in ends.items()} == {1: 600, 3: 200, 100: 50}
    assert {n: arm.config.run.checkpoint_every for n, arm in ends.items()} == {
        1: 250,
        3: 200,
        100: 50,
    }


def test_fewer_flops_per_token_are_more_tokens(config):
    a, b = planned(config)
    assert a.config.optim.steps == 300 and b.tokens > a.tokens
    assert b.train_flops == pytest.approx(a.train_flops, rel=0.003)
    assert b.costs["flops_per_token"] == measure(b.config, "active-flops")
    tokens = planned(config, budget=Budget(tokens=250 * 128))[0]
    assert tokens.tokens == 250 * 128 and tokens.config.optim.steps == 250


def test_a_budget_of_few_sequences_is_no_equal_budget(config):
    with pytest.raises(UsageError, match="FLOPs beside a; raise the budget"):
        planned(config, budget=Budget(steps=1))


def test_the_baseline_keeps_its_sizes(config):
    a, b = planned(config, match=("active-flops",), baseline="b")
    assert b.solved == {} and b.config.model.moe.d_expert == 8
    want = match(a.config, {"active-flops": b.costs["flops_per_token"]}).config.model.moe.d_expert
    assert a.config.model.moe.d_expert == want != 16


def test_a_run_is_named_by_what_changes_its_numbers(config):
    key = config_hash(config)
    for path in ("run.dir", "recipe", "data.cache_dir"):
        assert config_hash(with_leaf(config, path, "other")) == key
    for path, value in (("run.seed", 3), ("optim.lr", 1.0), ("model.moe.top_k", 1)):
        assert config_hash(with_leaf(config, path, value)) != key
    assert len({key, config_hash(config, double_head), config_hash(config, halve_head)}) == 3


def scaled(factor, model):
    model.head.weight.mul_(factor)


def test_the_values_that_an_edit_is_bound_to_name_the_run(config):
    def closure(factor):
        return lambda model: model.head.weight.mul_(factor)

    edits = [partial(scaled, 2.0), partial(scaled, 3.0), closure(2.0), closure(3.0)]
    assert len({config_hash(config, edit) for edit in edits}) == 4
    assert config_hash(config, partial(scaled, 2.0)) == config_hash(config, edits[0])


def test_seeds_change_the_batches_and_arms_do_not(config):
    other = with_leaf(config, "model.moe.d_expert", 8)
    assert batches_sha256(config) == batches_sha256(other)
    assert batches_sha256(config) != batches_sha256(with_leaf(config, "run.seed", 1))


def test_an_edit_is_part_of_its_arm(config, tmp_path):
    arms = (Arm("plain", config), Arm("double", config, double_head))
    plan = Experiment(arms, (0,), Budget(steps=2)).plan(quiet)
    plain, double = (execute(arm.run(0), tmp_path / "runs") for arm in plan)
    assert plain["bits_per_byte"] != double["bits_per_byte"]
    assert plain["batches_sha256"] == double["batches_sha256"]


def test_a_run_that_diverges_is_a_result(config, tmp_path):
    wild = replace(
        config, optim=replace(config.optim, lr=1e30, clip=0.0, spike=0.0, max_skipped=2, steps=12)
    )
    arms = (Arm("a", config), Arm("wild", wild))
    plan = Experiment(arms, (0,), Budget(steps=12)).plan(quiet)
    result = execute(plan[1].run(0), tmp_path / "runs")
    assert result["bits_per_byte"] is None and "skipped" in result["error"]
    assert execute(plan[1].run(0), tmp_path / "runs")["attempts"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seeds": ()}, "not different ones"), ({"baseline": "c"}, "is no arm; use a, b")],
)
def test_mistakes(config, change, words):
    with pytest.raises(UsageError, match=words):
        planned(config, **change)


def test_options_of_later_versions_leave_the_names_of_runs_alone():
    """A folder of a run that was trained before there was `optim.transfer` is still its folder."""
    default = leaves(Config().to_dict())
    assert all(default[name] == value for name, value in ADDED.items())
    before = {k: v for k, v in default.items() if k not in ADDED and k not in ELSEWHERE}
    name = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]
    assert config_hash(Config()) == name
    assert config_hash(with_leaf(Config(), "optim.transfer", "width")) != name
