"""headway study on tiny models: registered before it is run, never paid twice, judged by its rows."""

import json
import shutil

import numpy as np
import pytest

from headway.config import Config, OptimConfig
from headway.lab.runs import auto_dtype
from headway.lab.statistics import t_interval
from headway.lab.study import load, tasks, train
from headway.optim.schedule import steps_before_fall
from tests.command import call, mistake, write_recipe

FILE = """
from headway import recipes
from headway.config import with_leaf
from headway.lab.experiment import Arm, Experiment
from headway.lab.study import Claim, Contrast, Prediction, Series, Study
from headway.train.budget import Budget

CONFIG = with_leaf(recipes.load("tiny.py:tiny"), "optim.warmup_steps", 1)
ARMS = (Arm("base", CONFIG), Arm("slow", with_leaf(CONFIG, "optim.lr", 1e-4)))


def series(stage, seeds):
    experiment = Experiment(ARMS, seeds, Budget(steps=1), eval_tokens=256, evaluations=1)
    return Series(stage, "tiny text", experiment, (10, 20))


def claim(id, region, margin, steps=20, min_seeds=2):
    contrast = (Contrast("slow", "base", steps),)
    prediction = Prediction(0.0, -1.0, 1.0)
    text, source = "slow is " + region, "a test"
    return Claim(id, text, source, contrast, region, "tiny text", margin, min_seeds, prediction)


STUDY = Study(
    "small",
    "Is slow better?",
    (series("screen", (0,)), series("confirm", (11, 12))),
    (
        claim("A", "not_worse", 90.0),
        claim("B", "better", 90.0),
        claim("C", "equal", 90.0, steps=10),
        claim("D", "equal", 90.0, min_seeds=3),
    ),
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_recipe(root)
    (root / "studies").mkdir()
    (root / "studies" / "small.py").write_text(FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HEADWAY_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def done(place):
    assert call("study", "small", "--register").code == 0
    done = call("study", "small", "--run", "--json")
    assert done.code == 0, done.err
    return done.json


def rows(place):
    return json.loads((place / "docs/numbers/studies/small.json").read_text())["rows"]


def test_claims_are_judged_by_the_confirming_runs(place, done):
    claims = {claim["id"]: claim for claim in done["claims"]}
    assert {i: c["verdict"] for i, c in claims.items()} == {
        "A": "holds",
        "B": "refuted",
        "C": "holds",
        "D": "open",
    }
    bits = {(r["arm"], r["seed"], r["budget"]): r["bits_per_byte"] for r in rows(place)}
    x = [bits["slow", s, 20] - bits["base", s, 20] for s in (11, 12)]
    assert claims["A"]["estimate"] == pytest.approx(np.mean(x))
    assert claims["A"]["ci"] == pytest.approx(t_interval(x, claims["A"]["alpha_adjusted"]))
    assert claims["A"]["alpha_adjusted"] >= 0.05 / 4 and claims["A"]["prediction_hit"]
    assert claims["D"]["estimate"] is None and claims["D"]["seeds"] == [11, 12]
    assert len(rows(place)) == 3 * 2 * 2 == len({r["config_hash"] for r in rows(place)})
    assert {r["stage"] for r in rows(place)} == {"screen", "confirm"}
    fall = steps_before_fall(OptimConfig(steps=10, warmup_steps=1))
    assert 1 < fall < 10 and {r["continued"] for r in rows(place) if r["budget"] == 10} == {fall}
    assert {r["continued"] for r in rows(place) if r["budget"] == 20} == {0}


def test_it_says_how_long_the_rest_takes(place, done, tmp_path):
    study = load("small", place / "studies")
    todo, lines = list(tasks(study))[:3], list[str]()
    both = {todo[0].key(steps) for steps in (10, 20)}
    short, long = (todo[0].planned[steps].train_flops for steps in (10, 20))
    assert todo[0].flops(both) == 0 and todo[0].flops(()) == long > short
    assert todo[0].flops({todo[0].key(20)}) == short
    train(study, todo, tmp_path, tmp_path / "rows.json", log=lines.append)
    left = [line for line in lines if "minutes left, for one process" in line]
    assert len(left) == 2 and lines.index(left[-1]) < next(
        i for i, line in enumerate(lines) if line.startswith("3 of 3")
    )


def test_no_row_is_paid_twice(place, done):
    before = rows(place)
    shutil.rmtree(place / "runs")
    assert call("study", "small", "--run").code == 0
    assert not (place / "runs" / "studies" / "runs").exists() and rows(place) == before
    again = call("study", "small", "--only", "slow", "--seed", "12", "--json")
    assert [r["bits_per_byte"] for r in again.json["rows"]] == [
        r["committed"] for r in again.json["rows"]
    ]
    assert len(again.json["rows"]) == 2 and rows(place) == before
    bits = f"{again.json['rows'][0]['committed']:.4f} in {auto_dtype(Config())}"
    assert f"slow, 10 steps: {bits}; committed: {bits}" in again.out


def test_a_registration_is_for_good(place, done):
    path = place / "studies" / "registered" / "small.json"
    text, file = path.read_text(), place / "studies" / "small.py"
    assert "registered already" in mistake("study", "small", "--register")
    path.write_text(text.replace('"margin": 90.0', '"margin": 91.0'))
    assert "was changed after it was written" in mistake("study", "small")
    path.write_text(text)
    file.write_text(FILE.replace('"B", "better", 90.0', '"B", "better", 89.0'))
    said = mistake("study", "small", "--verdict")
    assert "claim B is not the one registered" in said and "margin was 90.0 and is 89.0" in said
    file.write_text(FILE.replace('        claim("C", "equal", 90.0, steps=10),\n', ""))
    assert "claim C is registered" in mistake("study", "small")
    file.write_text(FILE.replace("1e-4", "2e-4"))
    said = mistake("study", "small", "--run")
    assert "arm slow" in said and "optim.lr was 0.0001 and is 0.0002" in said
    file.write_text(FILE.replace("(11, 12)", "(11, 12, 13)"))
    said = mistake("study", "small", "--run")
    assert "seeds [13] are not registered" in said and "use [11, 12]" in said
    # what is added later is exploratory, and changes no verdict of the family
    extra = '        claim("E", "not_worse", 90.0),\n'
    file.write_text(FILE.replace('        claim("D"', extra + '        claim("D"'))
    claims = {c["id"]: c for c in call("study", "small", "--json").json["claims"]}
    assert (claims["E"]["registered"], claims["E"]["verdict"]) == (False, "holds")
    assert claims["A"]["alpha_adjusted"] == done["claims"][0]["alpha_adjusted"]
    file.write_text(FILE)


SCORED = """
import json

from headway.lab.measurement import Verdict
from headway.lab.study import Rule


def nats(folder):
    assert any((folder / "checkpoints").iterdir()), "the weights can still be read"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines if '"val_loss"' in line]
    return {"nats": losses[-1]["val_loss"]}


def largest(rows):
    worst = max(rows, key=lambda row: row["scores"]["nats"])
    return Verdict("holds" if worst["arm"] == "slow" else "refuted", f"worst is {worst['arm']}")


WORST = Rule("R", "slow is worst", "a test", "Holds if the largest loss is slow's.", largest)
"""


def test_scores_and_rules(place):
    """A score is measured of each run's last weights; a rule judges once, when all runs are
    there, and its function is registered."""
    text = FILE.replace("(0,)", "(3,)").replace("(11, 12)", "(21, 22)").replace('"small"', '"more"')
    text = text.replace("\nSTUDY =", SCORED + "\nSTUDY =").replace(
        'claim("D", "equal", 90.0, min_seeds=3),\n    ),',
        'dataclasses.replace(claim("D", "not_worse", 90.0), metric="nats"),\n    ),\n'
        "    rules=(WORST,),\n    scores=nats,",
    )
    file = place / "studies" / "more.py"
    file.write_text("import dataclasses\n" + text)
    try:
        assert call("study", "more", "--register").code == 0
        one = call("study", "more", "--run", "--stage", "screen", "--json").json
        assert one["rules"][0]["verdict"] == "open" and one["rules"][0]["why"] == "0 of 8 runs"
        done = call("study", "more", "--run", "--json").json
        rows = json.loads((place / "docs/numbers/studies/more.json").read_text())["rows"]
        nats = {(r["arm"], r["seed"]): r["scores"]["nats"] for r in rows if r["budget"] == 20}
        result = json.loads(
            (place / "runs/studies/runs" / rows[0]["config_hash"] / "result.json").read_text()
        )
        assert rows[0]["scores"]["nats"] == pytest.approx(result["val_loss"], rel=1e-5)
        claim = next(c for c in done["claims"] if c["id"] == "D")
        x = [nats["slow", s] - nats["base", s] for s in (21, 22)]
        assert claim["estimate"] == pytest.approx(np.mean(x)) and "nats" in claim["statistic"]
        (rule,) = done["rules"]
        assert (rule["id"], rule["registered"], rule["verdict"]) == ("R", True, "holds")
        assert call("study", "list", "--page").code == 0
        page = (place / "docs" / "studies.md").read_text()
        assert "| [more](#more) | R: slow is worst | holds |" in page and "| nats |" in page
        # another study of the same runs, which measures something else, gets that
        other = text.replace('return {"nats": losses[-1]["val_loss"]}', 'return {"nats": 7.0}')
        (place / "studies" / "third.py").write_text(
            "import dataclasses\n" + other.replace('"more"', '"third"')
        )
        assert call("study", "third", "--run", "--stage", "screen").code == 0
        third = json.loads((place / "docs/numbers/studies/third.json").read_text())["rows"]
        assert {row["scores"]["nats"] for row in third} == {7.0}
        first = {(r["arm"], r["seed"], r["budget"]): r["bits_per_byte"] for r in rows}
        same = [first[r["arm"], r["seed"], r["budget"]] == r["bits_per_byte"] for r in third]
        assert len(same) == 4 and all(same)
        (place / "studies" / "third.py").unlink()
        file.write_text(file.read_text().replace('== "slow" else', '== "base" else'))
        assert "claim R is not the one registered" in mistake("study", "more")
        file.write_text("import dataclasses\n" + text.replace("[-1][", "[0]["))
        assert "measures of its runs is not what" in mistake("study", "more")
        file.write_text("import dataclasses\n" + text.replace('metric="nats"', 'metric="nat"'))
        shutil.move(place / "studies/registered/more.json", place / "away.json")
        assert "a claim reads nat, which the rows do not have" in mistake("study", "more")
        file.write_text("import dataclasses\n" + text.replace('Rule("R"', 'Rule("A"'))
        assert "two claims of one name" in mistake("study", "more", "--register")
    finally:
        file.unlink()


def test_mistakes_are_named(place, done):
    assert "no study nothing; use one of small" in mistake("study", "nothing")
    assert "no arm other" in mistake("study", "small", "--only", "other")
    assert "no runs of --stage" in mistake("study", "small", "--run", "--corpus", "tiny")
    assert "has no studies" in mistake("study", "small", "--studies", "nowhere")
    assert "--seed is for --only" in mistake("study", "small", "--seed", "3")
    assert "--quick is for --run" in mistake("study", "small", "--quick")
    assert "give one" in mistake("study", "small", "--run", "--only", "slow")
    assert "below 0" in mistake("study", "small", "--run", "--cpu-minutes", "-1")
    assert "list is of all studies" in mistake("study", "list", "--run")
    file = place / "studies" / "small.py"
    other = """
SECOND = (ARMS[0], Arm("slow", with_leaf(CONFIG, "optim.lr", 3e-4)))
EXPERIMENT = Experiment(SECOND, (13,), Budget(steps=1), eval_tokens=256, evaluations=1)
OTHER = Series("confirm", "tiny text", EXPERIMENT, (10, 20))
"""
    twice = FILE.replace("(11, 12)))", "(11, 12)), OTHER)").replace(
        "\nSTUDY =", f"{other}\nSTUDY ="
    )
    file.write_text(twice)
    assert "two series call different arms 'slow'" in mistake("study", "small", "--run")
    file.write_text(FILE.replace("STUDY =", "1 / 0\nSTUDY ="))
    line = FILE[: FILE.index("STUDY =")].count("\n") + 1
    said = mistake("study", "small")
    assert f"small.py:{line} raises ZeroDivisionError: division by zero" in said
    file.write_text(FILE + "(")
    assert "small.py raises SyntaxError" in mistake("study", "list")
    file.write_text(FILE)
    listed = call("study", "list", "--json").json["studies"]
    assert [(s["name"], s["rows"]) for s in listed] == [("small", 12)]
    lost = mistake("study", "list", "--page", "--numbers", file / "numbers" / "studies")
    assert "cannot write" in lost and "small.py" in lost
    assert call("study", "list", "--page").code == 0
    page = (place / "docs" / "studies.md").read_text()
    assert "| A | slow − base at 20 steps | tiny text | < 90 | 2 |" in page
    plot = (place / "docs" / "studies" / "small.svg").read_text()
    assert plot.count("<circle") == 3 and ">arm − baseline, bits/byte<" in plot
    assert f" in {auto_dtype(Config())}, commits" in page


MEASURED = """
from headway.lab.measurement import Measurement, Verdict

STUDY = Measurement("plain", "c", "r", lambda: [{"x": 1}], lambda rows: Verdict("holds", "x."))
"""


def test_a_study_that_trains_nothing_ignores_no_option(place, done):
    file, result = place / "studies" / "plain.py", place / "docs/numbers/studies/plain.json"
    file.write_text(MEASURED)
    try:
        for options in (("--quick",), ("--stage", "confirm"), ("--cpu-minutes", "1")):
            said = mistake("study", "plain", "--run", *options)
            assert f"plain trains nothing: {options[0]} is not for it" in said
        assert "--register is not for it" in mistake("study", "plain", "--register")
        assert not result.exists()
    finally:
        file.unlink()


def test_tables_read_rows_of_other_studies(place, done):
    """A table has the rows of its study and of those that it names, in the verdict and on the
    page."""
    table = """
def arms(rows):
    return [{"arms": ", ".join(sorted({row["arm"] for row in rows})), "n": len(rows)}]

"""
    file = place / "studies" / "tabled.py"
    text = FILE.replace('"small"', '"tabled"').replace("\nSTUDY =", table + "\nSTUDY =")
    end = text.rindex(")")
    file.write_text(text[:end] + '    tables={"arms": arms},\n    also=("small",),\n)\n')
    try:
        said = call("study", "tabled", "--json").json
        assert said["arms"] == [{"arms": "base, slow", "n": len(rows(place))}]
        assert call("study", "list", "--page").code == 0
        assert "arms:\n\n| arms | n |" in (place / "docs" / "studies.md").read_text()
        one = rows(place)[0]
        (place / "docs/numbers/studies/tabled.json").write_text(json.dumps({"rows": [one]}))
        assert call("study", "tabled", "--json").json["arms"] == said["arms"]  # a run of both
        changed = [one | {"config_hash": "0" * 16}]
        (place / "docs/numbers/studies/tabled.json").write_text(json.dumps({"rows": changed}))
        different = (
            "study tabled and one of small: base, seed 11, at 10 steps on tiny text are diff"
        )
        assert different in mistake("study", "tabled")
        foreign = [rows(place)[0] | {"validation": "other"}]
        (place / "docs/numbers/studies/tabled.json").write_text(json.dumps({"rows": foreign}))
        assert "were validated on different texts" in mistake("study", "tabled")
    finally:
        file.unlink()
        (place / "docs/numbers/studies/tabled.json").unlink(missing_ok=True)


def test_rows_of_another_dtype_are_not_continued(place, done):
    """What run.dtype=auto is depends on the machine: nothing is trained where it is another one
    than in the rows, or where rows of the arm do not say what it was."""
    here = auto_dtype(Config())
    other = "float32" if here == "bfloat16" else "bfloat16"
    file, numbers = place / "studies" / "auto.py", place / "docs/numbers/studies/auto.json"
    file.write_text(FILE.replace('"small"', '"auto"'))
    assert {row["auto_dtype"] for row in rows(place)} == {here}
    base, slow = (row for row in rows(place) if (row["seed"], row["budget"]) == (11, 10))
    del base["auto_dtype"], slow["auto_dtype"]
    try:
        for told, was in (
            (base | {"auto_dtype": other}, f"for base, seed 11, run.dtype=auto was {other}"),
            (slow | {"auto_dtype": other}, f"for slow, seed 11, run.dtype=auto was {other}"),
            (base, "for base, seed 11, it is not known what it was"),
        ):
            numbers.write_text(json.dumps({"rows": [told]}))
            said = mistake("study", "auto", "--run", "--dir", "elsewhere")
            assert f"base, seed 0: run.dtype=auto is {here} on this machine, and {was}" in said
            assert not (place / "elsewhere").exists()
        known = [row | {"auto_dtype": other} for row in rows(place)]
        numbers.write_text(json.dumps({"rows": known}))
        assert call("study", "auto", "--run", "--dir", "elsewhere").code == 0  # all are there
        numbers.write_text(json.dumps({"rows": [slow]}))  # unknown, and another arm
        stopped = ("--stage", "confirm", "--cpu-minutes", "1e-9")
        assert call("study", "auto", "--run", "--dir", "elsewhere", *stopped).code == 0
    finally:
        file.unlink()
        numbers.unlink(missing_ok=True)
