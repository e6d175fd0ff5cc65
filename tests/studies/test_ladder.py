"""The ladders: a law that made its rows is found, registered at the best width, and scored."""

import dataclasses
import json
import math
from types import ModuleType

import pytest

from headway.config import UsageError
from headway.lab.study import quick, tasks, train
from studies import ladder, ladder_large
from studies.ladder_law import planned


@dataclasses.dataclass(frozen=True)
class Case:
    """A ladder, and the best number of tokens of the law that makes its rows."""

    module: ModuleType
    flops: float
    tokens: float
    widths: float
    """How far, as a ratio, its widths leave a run from the best number of tokens."""

    @property
    def base(self):
        return int(self.module.BASE[2:])

    def one(self, width):
        return planned(self.module.arm(width), 1)

    def best_tokens(self, flops):
        return self.tokens * (flops / self.flops) ** 0.5

    def bits(self, flops, tokens, gain=1.0):
        """A law of FLOPs, and a parabola about the best number of tokens."""
        least = 0.5 + 2.0 * (gain * flops / self.flops) ** -0.15
        return least + 0.06 * math.log(tokens / self.best_tokens(flops)) ** 2

    def row(self, name, budget, gain=1.0):
        """The row of a run that gains at the baseline's loss in compute."""
        arm = self.one(int(name.split(",")[0][2:]))
        base = self.one(self.base).train_flops * budget
        tokens = round(base / arm.train_flops) * arm.tokens
        loss = self.bits(base, tokens)
        if gain != 1:
            loss = 0.5 + (loss - 0.5) * gain**-0.15
        return {"corpus": "python", "arm": name, "budget": budget, "train_flops": base, "tokens": tokens, "bits_per_byte": loss}  # fmt: skip

    def rows(self, gains=(1.3, 1.3, 1.3)):
        parts, budgets = self.module.LADDER, self.module.BUDGETS
        keys = {(a.name, n) for part in parts for a in part.experiment.arms for n in part.steps}
        changed = [
            self.row(self.module.CHANGED.name, n, g) for n, g in zip(budgets, gains, strict=False)
        ]
        return [*(self.row(name, budget) for name, budget in sorted(keys)), *changed]


SMALL = Case(ladder, 3e11, 1.1e6, 0.12)
LARGE = Case(ladder_large, 2.2e13, 1.3e7, 0.12)
CASES = pytest.mark.parametrize("case", [SMALL, LARGE], ids=lambda c: c.module.__name__)


def noisy(made):
    """The rows with losses that are off by 0.05%, up and down in turn."""
    signs = ((-1) ** i for i in range(len(made)))
    return [
        {**r, "bits_per_byte": r["bits_per_byte"] * (1 + 0.0005 * sign)}
        for r, sign in zip(made, signs, strict=True)
    ]


@CASES
def test_the_law_of_the_rows_is_found(case):
    fitted, runs = case.module.law(case.rows())
    assert len(runs.loss_N) == 16
    parameters = fitted.law.parameters()
    assert parameters["alpha"] == pytest.approx(0.15, rel=0.01)
    table = case.module.summary(case.rows())
    assert [r["best tokens"] for r in table] == pytest.approx(
        [case.best_tokens(r["FLOPs"]) for r in table], rel=0.01
    )
    assert case.module.summary(case.rows()[3:]) == []


@CASES
def test_the_top_rung_is_registered_and_scored(case, tmp_path, monkeypatch):
    module = case.module
    numbers = tmp_path / "docs" / "numbers" / "studies"
    numbers.mkdir(parents=True)
    rows = case.rows()
    (numbers / f"{module.STUDY.name}.json").write_text(json.dumps({"rows": noisy(rows)}))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "FORECAST", tmp_path / "forecast.json")
    module.forecast()
    value = json.loads((tmp_path / "forecast.json").read_text())
    flops, tokens = value["at"]["flops"], value["tokens"]
    of_base = case.one(case.base).train_flops
    assert flops == pytest.approx(module.TOP_BUDGET * of_base, rel=1e-3)
    assert tokens == pytest.approx(case.best_tokens(flops), rel=case.widths)
    law = 0.5 + 2.0 * (flops / case.flops) ** -0.15
    assert value["prediction"] == pytest.approx(law, rel=5e-3)
    top = {"arm": "D 40", "budget": 50_000, "train_flops": flops, "tokens": tokens}
    for loss, answer in ((1.001, "holds"), (1.02, "refuted")):
        run = {**top, "bits_per_byte": value["prediction"] * loss}
        assert module.judge_forecast([*rows, run]).answer == answer
    with pytest.raises(UsageError, match="it is another run"):
        module.judge_forecast([{**top, "tokens": 2 * tokens, "bits_per_byte": 1.0}])
    assert module.judge_forecast(rows).answer == "open"


def test_the_other_form_reads_parameters_and_tokens():
    """Of rows that a Chinchilla law made it says the top one, and what a run is off."""

    def by_law(r):
        width = int(r["arm"].removeprefix("D "))
        params = SMALL.one(width).costs["active_parameters"]
        return {**r, "bits_per_byte": 1.5 + 500 * params**-0.6 + 1e5 * r["tokens"] ** -0.9}

    made = [by_law(r) for r in SMALL.rows() if "E" not in r["arm"]]
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
@CASES
def test_the_gain_of_experts(case, gains, answer, says):
    said = case.module.judge_gain(noisy(case.rows(gains)))
    assert said.answer == answer and says in said.why
    # 16 and 64 experts of one width, at equal FLOPs
    arms = case.module.PLAIN, case.module.CHANGED
    assert [arm.config.model.moe.n_experts for arm in arms] == [16, 64]


def test_a_ladder_without_a_minimum_tells_nothing():
    ln = [math.log(r["tokens"]) for r in SMALL.rows()]
    falling = [
        {**r, "bits_per_byte": 3 - 0.1 * x + 0.002 * x**2}
        for r, x in zip(SMALL.rows(), ln, strict=True)
    ]
    assert ladder.judge_gain(falling).answer == "cannot_tell" and ladder.summary(falling) == []


def test_the_study_runs(tmp_path):
    """A run of each series, by `--quick`."""
    small = quick(ladder.STUDY)
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
