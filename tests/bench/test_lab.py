"""bench/lab.py at tiny sizes: every part without training gives rows and targets."""

import json
import sys

import pytest

from bench import common, lab


def test_parts_that_train_nothing(capsys, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(
        sys, "argv", ["lab", "--quick", "--only", "schedule,results,bootstrap", "--json"]
    )
    lab.main()
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["part"], row.get("side") or row.get("asked")): row for row in value["rows"]}
    assert set(rows) == {
        ("schedule", "headway"), ("schedule", "optuna"), ("bootstrap", None),
        ("results", "all"), ("results", "where"), ("results", "group"),
    }  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows.values())
    ratio = rows["schedule", "headway"]["seconds"] / rows["schedule", "optuna"]["seconds"]
    by_name = {target["name"]: target["value"] for target in value["targets"]}
    assert by_name["sweep: 10 empty runs, time over optuna's"] == ratio
    assert len(value["targets"]) == 6


def test_a_part_that_is_measured_again_keeps_the_others(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "NUMBERS", tmp_path)
    others = [{"part": "page", "runs": 20, "seconds": 0.1, "megabytes": 0.03, "commit": "abc"}]
    (tmp_path / "lab.json").write_text(json.dumps({"rows": others}))
    monkeypatch.setattr(sys, "argv", ["lab", "--quick", "--only", "bootstrap", "--json", "--save"])
    lab.main()
    value = json.loads((tmp_path / "lab.json").read_text())
    new, old = value["rows"]
    assert old == others[0] and new["part"] == "bootstrap" and new["commit"] == value["commit"]
    assert any("Chromium: seconds" in target["name"] for target in value["targets"])
