"""headway results on folders as runs leave them."""

import csv
import io
import json
import subprocess
import sys

import pytest

from headway.config import Config
from headway.lab.statistics import t_interval
from tests.command import call, mistake

BITS = {("latent", 0): 2.0, ("latent", 1): 2.1, ("moe", 0): 1.9, ("moe", 1): None}


@pytest.fixture
def folder(tmp_path):
    """Four finished runs, one of which diverged; one that is not finished, one that is damaged."""
    for (kind, seed), bits in BITS.items():
        config = Config().to_dict()
        config["model"]["moe"]["kind"], config["run"]["seed"] = kind, seed
        write(tmp_path, f"{kind}{seed}", json.dumps({
            "config": config, "config_hash": f"{kind}{seed}", "bits_per_byte": bits,
            "cpu_seconds": 12.5, "tokens": 102400, "error": "" if bits else "loss is nan",
            "validation": {"fingerprint": "x"},
        }))  # fmt: skip
    write(tmp_path, "open", None)
    write(tmp_path, "cut", '{"config": {')
    write(tmp_path, "part", '{"bits_per_byte": 1.0}')
    return tmp_path


def write(root, name, text):
    (root / "runs" / name).mkdir(parents=True)
    if text is not None:
        (root / "runs" / name / "result.json").write_text(text)


def test_a_table_shows_what_differs(folder):
    done = call("results", str(folder), "--json")
    lines = done.out.splitlines()
    assert (
        lines[0].split() == "config_hash kind seed bits_per_byte cpu_seconds tokens error".split()
    )
    assert [line.split()[0] for line in lines[1:5]] == ["moe0", "latent0", "latent1", "moe1"]
    assert lines[4].split() == ["moe1", "moe", "1", "–", "12.5000", "102,400", "loss", "is", "nan"]
    assert [row["bits_per_byte"] for row in done.json["rows"]] == [1.9, 2.0, 2.1, None]
    assert done.json["rows"][0]["model.moe.n_experts"] == Config().model.moe.n_experts
    assert "3 of the runs in" in done.err and "have no whole result.json" in done.err


def test_groups_have_mean_and_interval(folder):
    rows = call("results", str(folder), "--group", "moe.kind", "--json").json["rows"]
    assert [row["model.moe.kind"] for row in rows] == ["moe", "latent"]
    assert rows[0] | {"mean": 1.9} == rows[0] and rows[0]["ci95"] is None
    assert (rows[0]["n"], rows[0]["failed"], rows[1]["n"], rows[1]["failed"]) == (1, 1, 2, 0)
    assert rows[1]["mean"] == pytest.approx(2.05)
    assert rows[1]["ci95"] == pytest.approx(list(t_interval([2.0, 2.1])))
    seconds = call("results", str(folder), "--group=seed", "--metric=cpu_seconds", "--json").json
    assert [row["mean"] for row in seconds["rows"]] == [12.5, 12.5]


def test_runs_on_other_text_are_not_ranked_together(folder):
    path = folder / "runs" / "latent1" / "result.json"
    path.write_text(path.read_text().replace('"fingerprint": "x"', '"fingerprint": "a"'))
    rows = call("results", str(folder), "--json").json["rows"]
    assert [row["config_hash"] for row in rows] == ["latent1", "moe0", "latent0", "moe1"]
    assert "fingerprint" in call("results", str(folder)).out.splitlines()[0]
    rows = call("results", str(folder), "--group", "kind", "--json").json["rows"]
    key = "validation.fingerprint"
    values = [(row[key], row["model.moe.kind"], row["n"], row["mean"]) for row in rows]
    assert values == [("a", "latent", 1, 2.1), ("x", "moe", 1, 1.9), ("x", "latent", 1, 2.0)]


def test_losses_without_copied_targets_are_not_ranked_over_windows_of_other_lengths(folder):
    for number, (kind, seed) in enumerate(BITS):
        path = folder / "runs" / f"{kind}{seed}" / "result.json"
        result = json.loads(path.read_text()) | {"bits_per_byte_uncopied": 4.0 - number / 2}
        result["config"]["data"]["seq_len"] = 128 if seed else 256
        path.write_text(json.dumps(result))
    words = ("results", str(folder), "--json")
    rows = call(*words, "--sort", "bits_per_byte_uncopied").json["rows"]
    assert [row["config_hash"] for row in rows] == ["moe1", "latent1", "moe0", "latent0"]
    rows = call(*words, "--group", "kind", "--metric", "bits_per_byte_uncopied").json["rows"]
    assert len(rows) == 4 and {row["data.seq_len"] for row in rows} == {128, 256}
    assert len(call(*words, "--group", "kind").json["rows"]) == 2  # the whole text is the same


def test_conditions_and_order(folder):
    done = call(
        "results", str(folder), "--where", "kind=latent or seed=1", "--sort=-seed", "--json"
    )
    assert [row["config_hash"] for row in done.json["rows"]] == ["latent1", "moe1", "latent0"]


def test_csv_is_read_back(folder):
    text = call("results", str(folder), "--csv", "--group", "kind").out
    rows = [*csv.DictReader(io.StringIO(text))]
    assert [row["model.moe.kind"] for row in rows] == ["moe", "latent"]
    assert rows[0]["ci95_low"] == "" and float(rows[1]["ci95_low"]) < 2.05 < float(
        rows[1]["ci95_high"]
    )


def test_mistakes_are_one_line(folder, tmp_path):
    assert "has no runs; make some with headway compare" in mistake("results", str(tmp_path / "no"))
    write(tmp_path / "other", "a", None)
    assert "1 runs, none of them finished" in mistake("results", str(tmp_path / "other"))
    assert "holds for no run" in mistake("results", str(folder), "--where", "seed=7")
    assert "no number" in mistake("results", str(folder), "--group=seed", "--metric=moe.kind")
    assert "there is no field depth" in mistake("results", str(folder), "--sort", "depth")
    assert "seed=='" in mistake("results", str(folder), "--where", "seed=='")


def test_neither_tables_nor_supervisors_import_torch(folder):
    """It takes seconds, and a hundred megabytes."""
    program = (
        "import sys; from headway.cli.results import results; from headway.lab.sweep import resolved\n"
        f"results([{str(folder)!r}]); resolved({{'recipe': 'demo'}}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
