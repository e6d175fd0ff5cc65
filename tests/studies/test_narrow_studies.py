"""Studies of narrow models: their rules by hand, and a tiny run of each design."""

import dataclasses
from statistics import mean

import pytest

from headway.lab.study import quick, tasks, train
from headway.lab.verdict import judge
from headway.report.sinks import read_metrics
from studies import latent_eff_acc, routers, slicing_and_dicing
from studies.slicing_and_dicing import ARMS, judge_shared, judge_size

MODULES = slicing_and_dicing, latent_eff_acc, routers


def rows(bits):
    """Rows of arms: name → bits per byte of two seeds."""
    return [
        {"corpus": "python", "arm": arm, "seed": seed, "bits_per_byte": value}
        for arm, values in bits.items()
        for seed, value in enumerate(values)
    ]


def test_the_best_size_at_two_totals():
    at_8 = {"E 8, K 1": (2.4, 2.4), "E 16, K 2": (2.3, 2.3), "E 32, K 4": (2.0, 2.9), "E 64, K 8": (2.5, 2.5)}  # fmt: skip
    near = {"E 32, K 1": (2.4, 2.4), "E 64, K 2": (2.3, 2.3), "E 128, K 4": (2.2, 2.2), "E 256, K 8": (2.5, 2.5)}  # fmt: skip
    said = judge_size(rows({**at_8, **near}))
    assert said.answer == "holds" and "1/2 at a total of 8, 1/4 at a total of 32" in said.why
    far = {**near, "E 256, K 8": (2.1, 2.1)}
    assert judge_size(rows({**at_8, **far})).answer == "refuted"
    assert judge_size(rows({**at_8, **far, "E 256, K 8": (2.1, None)})).answer == "holds"


@pytest.mark.parametrize(
    ("shared", "doubled", "answer"),
    [(2.29, 2.2, "holds"), (2.31, 2.2, "holds"), (2.26, 2.2, "refuted"), (2.3, 2.31, "cannot_tell")],
)  # fmt: skip
def test_a_shared_expert_beside_twice_the_experts(shared, doubled, answer):
    bits = {"E 64, K 4": (2.3, 2.3), "E 64, K 3, shared": (shared,) * 2, "E 128, K 4": (doubled,) * 2}  # fmt: skip
    assert judge_shared(rows(bits)).answer == answer
    assert judge_shared(rows({**bits, "E 128, K 4": (2.2, None)})).answer == "cannot_tell"


def test_experts_of_a_token_are_as_wide_together_in_all_arms():
    for arm in ARMS:
        moe = arm.config.model.moe
        assert moe.top_k * moe.d_expert + moe.d_shared == 96


def test_claims_name_arms_that_are_trained():
    for module in MODULES:
        names = {task.arm for task in tasks(module.STUDY)}
        for claim in module.STUDY.claims:
            assert {n for c in claim.contrasts for n in (c.arm, c.baseline)} <= names
            assert claim.contrasts[0].steps == module.STEPS
        assert all(one.answer == "open" for one in judge(module.STUDY, [], set()))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.STUDY.name)
def test_each_design_trains(module, tmp_path):
    """By `--quick`, one seed; capacity, shared experts, biases, noise and latents among them."""
    small = quick(module.STUDY)
    distinct = module.STUDY.series[0].experiment.arms[-6:]
    arms = tuple(a for a in small.series[0].experiment.arms if a.name in {d.name for d in distinct})
    series = dataclasses.replace(
        small.series[0],
        experiment=dataclasses.replace(small.series[0].experiment, arms=arms, seeds=(101,)),
    )
    small = dataclasses.replace(small, series=(series,))
    made = train(small, list(tasks(small)), tmp_path, tmp_path / "rows.json", lambda _: None)
    assert {r["arm"] for r in made} == {a.name for a in arms}
    assert all(0 < r["bits_per_byte"] < 8.5 for r in made)
    if module is routers:
        row = made[0]
        records = read_metrics(tmp_path / "runs" / row["config_hash"] / "metrics.jsonl")
        largest = [r["load_max"] for r in records if "load_max" in r]
        assert row["scores"] == {"largest load / fair share": pytest.approx(mean(largest))}
        table = routers.table(made)
        assert [r["bits/byte"] for r in table] == sorted(r["bits/byte"] for r in table)
        assert len(table) == len(arms)
