"""headway compare on tiny models: equal tokens and FLOPs, runs that are never done twice, pairs, and the page."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from headway.checkpoint.lock import Holder, InUseError, Lock
from headway.config import Config, UsageError, from_dict
from headway.lab.runs import Run, documents, execute
from headway.lab.statistics import p_equal, p_not_worse, paired, seeds_for
from tests.command import call, mistake, write_recipe

FLAT = "flat=tiny.py:tiny:kind=moe,moe.n_heads=1"
DENSE = "dense=tiny.py:tiny:kind=dense,moe.n_heads=1"
OPTIONS = "--match active-flops --budget 60steps --seeds 11,12 --dir cmp".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    write_recipe(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def done(place):
    done = call("compare", FLAT, "heads=tiny.py:tiny", DENSE, *OPTIONS, "--json")
    assert done.code == 0, done.err
    (place / "page.html").write_bytes((place / "cmp" / "report.html").read_bytes())
    return done


def test_one_object_with_what_was_asked(done):
    value = done.json
    assert set(value) == {"match", "arms", "rows", "differences", "report"}
    assert [arm["name"] for arm in value["arms"]] == ["flat", "heads", "dense"]
    assert [(r["arm"], r["seed"]) for r in value["rows"]] == [
        (arm, seed) for seed in (11, 12) for arm in ("flat", "heads", "dense")
    ]
    assert [d["arm"] for d in value["differences"]] == ["heads", "dense"]
    assert {d["baseline"] for d in value["differences"]} == {"flat"}


def test_budgets_are_equal(done):
    value = done.json
    base = value["arms"][0]
    assert base["tokens"] == 60 * 4 * 16 and base["solved"] == {}
    for arm in value["arms"]:
        assert abs(arm["mismatch"].get("active-flops", 0)) <= 0.01
        assert abs(arm["train_flops"] / base["train_flops"] - 1) <= 0.003
        assert arm["flops_per_token"] / base["flops_per_token"] == pytest.approx(1, abs=0.01)
        for row in (r for r in value["rows"] if r["arm"] == arm["name"]):
            assert row["tokens"] == arm["tokens"] and row["train_flops"] == arm["train_flops"]
            assert row["cpu_seconds"] > 0 and row["tokens_per_second"] > 0
    assert value["arms"][2]["solved"].keys() == {"model.d_ff"}


def test_a_seed_reads_the_same_tokens_in_all_arms(done):
    by_seed = {}
    for row in done.json["rows"]:
        by_seed.setdefault(row["seed"], set()).add(row["batches_sha256"])
    assert {len(hashes) for hashes in by_seed.values()} == {1}
    assert len(set.union(*by_seed.values())) == 2


def test_differences_are_those_of_the_rows(done):
    value = done.json
    bits = {(r["arm"], r["seed"]): r["bits_per_byte"] for r in value["rows"]}
    for d in value["differences"]:
        pairs = [bits[d["arm"], seed] - bits["flat", seed] for seed in (11, 12)]
        want = paired(pairs)
        assert (d["n_seeds"], d["mean"], d["sd"], d["p"]) == (2, want.mean, want.sd, want.p)
        assert d["ci95"] == list(want.ci95) and d["mde80"] == want.mde80
        assert d["ci95_documents"][0] < d["mean"] < d["ci95_documents"][1]
    p = sorted(d["p"] for d in value["differences"])
    adjusted = sorted(d["p_holm"] for d in value["differences"])
    assert adjusted[0] == pytest.approx(min(1, 2 * p[0]))


def test_run_folders_hold_the_truth(place, done):
    for row in done.json["rows"]:
        folder = place / "cmp" / "runs" / row["config_hash"]
        result = json.loads((folder / "result.json").read_text())
        assert result["bits_per_byte"] == row["bits_per_byte"] and result["attempts"] == 1
        assert result["config"]["run"]["seed"] == row["seed"]
        assert result["config_hash"] == folder.name
        losses = documents(place / "cmp", row["config_hash"])
        assert losses.bits_per_byte == pytest.approx(row["bits_per_byte"], rel=1e-12)
        assert losses.targets_N.sum() > 0 and np.isfinite(losses.nats_N).all()
        assert not (folder / "checkpoints").exists()


def test_runs_are_done_once_and_damaged_ones_again(place, done):
    folders = sorted((place / "cmp" / "runs").iterdir())
    times = {f: (f / "result.json").stat().st_mtime_ns for f in folders}
    (folders[0] / "result.json").write_text("{half")
    again = call("compare", FLAT, "heads=tiny.py:tiny", DENSE, *OPTIONS, "--json")
    assert "5 of 6 runs are in cmp/runs already" in again.out
    first = {r["config_hash"]: r["bits_per_byte"] for r in done.json["rows"]}
    assert {r["config_hash"]: r["bits_per_byte"] for r in again.json["rows"]} == first
    assert [r["attempts"] for r in again.json["rows"] if r["config_hash"] == folders[0].name] == [2]
    changed = [f for f in folders if (f / "result.json").stat().st_mtime_ns != times[f]]
    assert changed == [folders[0]]


def test_runs_on_other_text_are_not_compared(place, done):
    shutil.copytree(place / "cmp", place / "other")
    path = next((place / "other").glob("runs/*/result.json"))
    fingerprint = json.loads(path.read_text())["validation"]["fingerprint"]
    path.write_text(path.read_text().replace(fingerprint, "another"))
    options = [*OPTIONS[:-1], "other"]
    said = mistake("compare", FLAT, "heads=tiny.py:tiny", DENSE, *options)
    assert "runs in other were validated on other text; use another --dir" in said


def test_runs_of_machines_with_other_dtypes_are_no_pair(place, done):
    """`run.dtype=auto` is one config, and so one folder, on a CPU with bfloat16 and on one without."""
    shutil.copytree(place / "cmp", place / "mixed")
    for i, path in enumerate(sorted((place / "mixed").glob("runs/*/result.json"))):
        result = json.loads(path.read_text())
        assert result["auto_dtype"] in ("float32", "bfloat16")
        path.write_text(json.dumps(result | {"auto_dtype": "bfloat16" if i else "float32"}))
    options = [*OPTIONS[:-1], "mixed"]
    said = mistake("compare", FLAT, "heads=tiny.py:tiny", DENSE, *options)
    assert "run.dtype=auto were trained in bfloat16 and float32" in said


def test_a_margin_is_tested_and_priced(done):
    margin = call("compare", FLAT, "heads=tiny.py:tiny", *OPTIONS, "--margin", "0.5", "--json")
    (row,) = margin.json["differences"]
    pairs = [r["bits_per_byte"] for r in margin.json["rows"]]
    differences = [pairs[1] - pairs[0], pairs[3] - pairs[2]]
    assert row["p_not_worse"] == p_not_worse(differences, 0.5)
    assert row["p_equal"] == p_equal(differences, 0.5) >= row["p_not_worse"]
    assert row["seeds_for_margin"] == seeds_for(0.5, row["sd"])
    spent = sum(r["cpu_seconds"] for r in margin.json["rows"]) / 2 / 60
    assert row["cpu_minutes_for_margin"] == pytest.approx(row["seeds_for_margin"] * spent)
    assert "margin" not in done.json["differences"][0] and "CPU minutes" in margin.out


def test_two_calls_at_once_share_the_runs(place, done):
    """Each run is trained by one of them, and gets the same bits as in a call alone."""
    command = [
        sys.executable,
        "-m",
        "headway",
        "compare",
        FLAT,
        "heads=tiny.py:tiny",
        DENSE,
        *OPTIONS,
        "--json",
    ]
    command[command.index("cmp")] = "shared"
    calls = [
        subprocess.Popen(c, stdout=subprocess.PIPE, text=True)
        for c in (command, [*command, "--workers", "2"])
    ]
    outputs = [json.loads(call.communicate()[0].strip().splitlines()[-1]) for call in calls]
    first = {r["config_hash"]: r["bits_per_byte"] for r in done.json["rows"]}
    for output in outputs:
        assert {r["config_hash"]: r["bits_per_byte"] for r in output["rows"]} == first
        assert {r["attempts"] for r in output["rows"]} == {1}
    assert not list((place / "shared").glob("runs/*/lease"))


def test_a_run_that_was_killed_is_taken_over(place, done):
    """By the process table: the lease of a process that is gone holds nobody up."""
    key = done.json["rows"][0]["config_hash"]
    folder = place / "cmp" / "runs" / key
    (folder / "result.json").unlink()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        Lock(folder, "lease")._create(folder / "lease")
        held = json.loads((folder / "lease").read_text())
        (folder / "lease").write_text(json.dumps({**held, **vars(Holder.of(process.pid))}))
        with pytest.raises(InUseError, match="is in use"):
            execute(planned_run(place, done), place / "cmp")
        process.communicate(b"\n")
    result = execute(planned_run(place, done), place / "cmp")
    assert result["bits_per_byte"] == done.json["rows"][0]["bits_per_byte"]
    assert not (folder / "lease").exists()


def planned_run(place, done):
    key = done.json["rows"][0]["config_hash"]
    config = json.loads((place / "cmp" / "runs" / key / "run.json").read_text())["config"]
    config["run"] |= {"keep_checkpoints": 2, "dir": ""}
    run = Run(from_dict(Config, config))
    assert run.key == key
    return run


def test_one_seed_has_no_interval(done):
    one = call("compare", FLAT, "heads=tiny.py:tiny", *OPTIONS[:4], "--seeds", "11,", "--json")
    assert one.code == 2  # `11,` is no list
    one = call(
        "compare",
        FLAT,
        "heads=tiny.py:tiny",
        *OPTIONS[:4],
        "--seeds",
        "1",
        "--dir",
        "one",
        "--json",
    )
    assert "one seed: no interval" in one.out
    row = one.json["differences"][0]
    assert [row[k] for k in ("sd", "ci95", "ci95_documents", "p", "p_holm", "mde80")] == [None] * 6


def test_the_page_draws_every_arm(place, done):
    page = (place / "page.html").read_text()
    assert "script" not in page.lower().replace("script-src", "") and "http://" not in page
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) == 6  # forest, curves, four Pareto plots
    forest, curves, *pareto = charts
    assert forest.count('class="seed"') == 4 and forest.count('class="dot') == 2
    assert curves.count('class="thin') == 6 and curves.count('class="thick') == 3
    assert [p.count('class="dot') for p in pareto] == [3] * 4
    for name in ("flat", "heads", "dense"):
        assert all(f">{name}" in chart or name in chart for chart in charts[1:])
    numbers = [float(x) for x in re.findall(r'c[xy]="([-0-9.]+)"', page)]
    assert all(map(math.isfinite, numbers)) and min(numbers) >= 0


def test_cpu_seconds_are_calibrated_steps(place):
    done = call(
        "compare",
        FLAT,
        "heads=tiny.py:tiny",
        "--match",
        "cpu-time",
        "--budget",
        "40steps",
        "--seeds",
        "1",
        "--dir",
        "time",
        "--json",
    )
    assert done.code == 0, done.err
    flat, heads = done.json["arms"]
    assert flat["steps"] == 40 and heads["solved"] == {}
    spent = [arm["steps"] * arm["step_seconds"] for arm in (flat, heads)]
    assert spent[1] == pytest.approx(spent[0], abs=heads["step_seconds"])
    assert done.json["match"]["equal"] == "cpu_seconds"


def test_the_commands_of_the_docs_can_be_matched(tmp_path, monkeypatch):
    """Planned, and not trained."""

    def planned(experiment, root, *, workers):
        arms = experiment.plan(lambda _: None)
        raise UsageError(f"planned {len(arms)} arms")

    monkeypatch.setattr("headway.lab.compare.compare", planned)
    monkeypatch.chdir(tmp_path)
    docs = (Path(__file__).parents[2] / "docs" / "lab.md").read_text()
    commands = re.findall(r"^    headway (compare .*)$", docs, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert re.search(r"planned \d arms", mistake(*command.split()))


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["tiny.py:tiny"], "two arms or more"),
        (["tiny.py:tiny", "other=tiny.py:tiny:top_k=2"], "resolve to the same config"),
        (["a=tiny.py:tiny", "a=tiny.py:tiny:d_expert=4"], "two arms are called a"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:n_heads=2"], "n_heads may be"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:top_l=2"], "no field top_l; did you mean"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:top_k"], "is no FIELD=VALUE"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:seq_len=8"], "data.seq_len is 16 in arm a and 8 in b"),
        (
            ["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--baseline", "c"],
            "--baseline c is no arm",
        ),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--seeds", "x"], "--seeds x"),
        (
            ["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--margin", "-1"],
            "margin -1.0 is below 0",
        ),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--seeds", "1,1"], "not different ones"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--budget", "3"], "no number with a unit"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--ranks", "0"], "--ranks 0 is below 1"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--workers", "0"], "--workers 0 is below"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--run.seed", "3"], "use --seeds"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:d_expert=4", "--steps", "3"], "use --budget"),
        (["a=tiny.py:tiny", "b=tiny.py:tiny:kind=dense,moe.n_heads=1"], "2 budgets"),
    ],
)
def test_mistakes_cost_one_line(place, arms, words):
    assert words in mistake("compare", *arms)
