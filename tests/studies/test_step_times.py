"""Predicted steps of designs at equal FLOPs and parameters."""

from dataclasses import replace

import pytest

from headway.lab.match import measure
from headway.plan.choose import rank_meshes
from headway.plan.machine import machine_named
from headway.plan.setting import Setting
from studies import step_times


@pytest.fixture
def few_layers(monkeypatch):
    monkeypatch.setattr(step_times, "LAYERS", 2)
    monkeypatch.setattr(step_times, "WIDTH", 512)


def test_designs_have_the_flops_and_parameters_of_flat(few_layers):
    configs = step_times.designs()
    base = configs[step_times.FLAT]
    for quantity in ("active-flops", "total-parameters"):
        target = measure(base, quantity)
        assert all(abs(measure(c, quantity) / target - 1) < 0.01 for c in configs.values())
    heads = {name: config.model.moe.n_heads for name, config in configs.items()}
    assert heads == {"flat": 1, "2 heads": 2, "2 slices": 2, "8 heads": 8, "8 slices": 8}


def test_the_fastest_mesh_and_micro_batch_count(few_layers):
    config, h100 = step_times.wide(step_times.flat("python")), machine_named("h100")
    row = step_times.predicted(config, h100, 2)
    every = [
        mesh["step_seconds"]
        for micro in (1, 2, 4, 8)
        for mesh in rank_meshes(
            Setting(replace(config, data=replace(config.data, micro_batch_size=micro)), h100), 2
        )["meshes"]
        if mesh["fits"]
    ]
    assert row["ms"] == pytest.approx(1000 * min(every)) and max(every) > min(every)


@pytest.mark.parametrize(
    "ratios, answer",
    [((0.9, 0.99), "holds"), ((1.1, 1.01), "refuted"), ((0.9, 1.01), "cannot_tell")],
)
def test_the_rule(ratios, answer):
    rows = [{"design": "8 heads", "over flat": ratio} for ratio in ratios]
    assert step_times.judge([*rows, {"design": "2 heads", "over flat": 3.0}]).answer == answer
