"""The ladder: a law that made its rows is found, registered at the best width, and scored."""

import dataclasses
import json
import math

import pytest

from headway.config import UsageError
from headway.lab.study import quick, tasks, train
from studies import ladder
from studies.ladder import BUDGETS, CHANGED, PLAIN, STUDY


def best_tokens(flops):
    return 1.1e6 * (flops / 3e11) ** 0.5


def bits(flops, tokens, gain=1.0):
    """A law of FLOPs, and a parabola about the best number of tokens."""
    least = 0.5 + 2.0 * (gain * flops / 3e11) ** -0.15
    return least + 0.06 * math.log(tokens / best_tokens(flops)) ** 2


def row(name, budget, gain=1.0):
    """The row of a run that gains at the baseline's loss in compute."""
    arm = ladder.planned(ladder.arm(int(name.split(",")[0][2:])), 1)
    base = ladder.planned(ladder.arm(48), 1).train_flops * budget
    tokens = round(base / arm.train_flops) * 1024
    loss = bits(base, tokens)
    if gain != 1:
        loss = 0.5 + (loss - 0.5) * gain**-0.15
    return {"arm": name, "budget": budget, "train_flops": base, "tokens": tokens, "bits_per_byte": loss}  # fmt: skip


def rows(gains=(1.3, 1.3, 1.3)):
    parts = ladder.LADDER
    keys = {(a.name, n) for part in parts for a in part.experiment.arms for n in part.steps}
    changed = [row(CHANGED.name, n, g) for n, g in zip(BUDGETS, gains, strict=False)]
    return [*(row(name, budget) for name, budget in sorted(keys)), *changed]


def noisy(made):
    """The rows with losses that are off by 0.05%, up and down in turn."""
    signs = ((-1) ** i for i in range(len(made)))
    return [
        {**r, "bits_per_byte": r["bits_per_byte"] * (1 + 0.0005 * sign)}
        for r, sign in zip(made, signs, strict=True)
    ]


def test_the_law_of_the_rows_is_found():
    fitted, runs = ladder.law(rows())
    assert len(runs.loss_N) == 16
    parameters = fitted.law.parameters()
    assert parameters["alpha"] == pytest.approx(0.15, rel=0.01)
    table = ladder.summary(rows())
    assert [r["best tokens"] for r in table] == pytest.approx(
        [best_tokens(r["FLOPs"]) for r in table], rel=0.01
    )
    assert ladder.summary(rows()[3:]) == []


def test_the_top_rung_is_registered_and_scored(tmp_path, monkeypatch):
    numbers = tmp_path / "docs" / "numbers" / "studies"
    numbers.mkdir(parents=True)
    (numbers / "ladder.json").write_text(json.dumps({"rows": noisy(rows())}))
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(ladder, "FORECAST", tmp_path / "forecast.json")
    ladder.forecast()
    value = json.loads((tmp_path / "forecast.json").read_text())
    flops, tokens = value["at"]["flops"], value["tokens"]
    assert flops == pytest.approx(5000 * ladder.planned(ladder.arm(48), 1).train_flops, rel=1e-3)
    assert tokens == pytest.approx(best_tokens(flops), rel=0.12)  # widths are multiples of 4
    assert value["prediction"] == pytest.approx(0.5 + 2.0 * (flops / 3e11) ** -0.15, rel=5e-3)
    top = {"arm": "D 40", "budget": 7000, "train_flops": flops, "tokens": tokens}
    for loss, answer in ((1.001, "holds"), (1.02, "refuted")):
        run = {**top, "bits_per_byte": value["prediction"] * loss}
        assert ladder.judge_forecast([*rows(), run]).answer == answer
    with pytest.raises(UsageError, match="it is another run"):
        ladder.judge_forecast([{**top, "tokens": 2 * tokens, "bits_per_byte": 1.0}])
    assert ladder.judge_forecast(rows()).answer == "open"


def test_the_other_form_reads_parameters_and_tokens():
    """Of rows that a Chinchilla law made it says the top one, and what a run is off."""

    def by_law(r):
        width = int(r["arm"].removeprefix("D "))
        params = ladder.planned(ladder.arm(width), 1).costs["active_parameters"]
        return {**r, "bits_per_byte": 1.5 + 500 * params**-0.6 + 1e5 * r["tokens"] ** -0.9}

    made = [by_law(r) for r in rows() if "E" not in r["arm"]]
    top = by_law({"arm": "D 56", "budget": 4052, "tokens": 4149248})
    (line,) = ladder.afterwards([*made, {**top, "bits_per_byte": 1.02 * top["bits_per_byte"]}])
    assert line["run"] == "D 56" and line["error"] == "+2.00%"
    assert float(line["by the law"]) == pytest.approx(top["bits_per_byte"], abs=1e-3)


@pytest.mark.parametrize(
    ("gains", "answer", "says"),
    [
        ((1.3, 1.3, 1.3), "holds", "gains at every rung"),
        ((0.7, 0.7, 0.7), "refuted", "loses at every rung"),
        ((0.7, 1.3, 1.3), "refuted", "not transferable"),
        ((1.0001, 1.3, 1.3), "cannot_tell", "an interval holds 1"),
    ],
)
def test_the_gain_of_experts(gains, answer, says):
    said = ladder.judge_gain(noisy(rows(gains)))
    assert said.answer == answer and says in said.why
    # 16 and 64 experts of one width, at equal FLOPs
    assert (PLAIN.config.model.moe.n_experts, CHANGED.config.model.moe.n_experts) == (16, 64)


def test_a_ladder_without_a_minimum_tells_nothing():
    ln = [math.log(r["tokens"]) for r in rows()]
    falling = [
        {**r, "bits_per_byte": 3 - 0.1 * x + 0.002 * x**2} for r, x in zip(rows(), ln, strict=True)
    ]
    assert ladder.judge_gain(falling).answer == "cannot_tell" and ladder.summary(falling) == []


def test_the_study_runs(tmp_path):
    """A run of each series, by `--quick`."""
    small = quick(STUDY)
    parts = tuple(
        dataclasses.replace(
            part,
            steps=part.steps[:1],
            experiment=dataclasses.replace(part.experiment, arms=part.experiment.arms[-1:]),
        )
        for part in small.series
    )
    small = dataclasses.replace(small, series=parts)
    made = train(small, list(tasks(small)), tmp_path, tmp_path / "rows.json", lambda _: None)
    assert {r["arm"] for r in made} >= {"D 24", "D 16", "D 64", "D 32, E 64"}
    assert all(0 < r["bits_per_byte"] < 9 and r["tokens"] for r in made)
