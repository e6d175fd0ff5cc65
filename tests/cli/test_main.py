"""The verbs of the command line: exit codes, JSON as the last line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.cli import main as cli
from tests.command import call, mistake


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run, made by the command."""
    folder = place / "runs" / "first"
    done = call(
        "train", f"{place}/tiny.py:tiny", "--run", folder, "--checkpoint-every", 2, "--json"
    )
    assert done.code == 0, done
    result = done.json
    assert result["steps"] == 6 and result["tokens"] == 6 * 4 * 16
    assert result["val_bits_per_byte"] < result["first_val_bits_per_byte"] < 8.5
    assert result["tokens_per_second"] > 0
    assert Path(result["checkpoint"]).name == "step-000006" and Path(result["report"]).is_file()
    for word in (
        "parameters",
        "bits/byte",
        "balance",
        "Head Parallel",
        "Expert Parallel",
        "report",
    ):
        assert word in done.out
    info = json.loads((folder / "run.json").read_text())
    assert "def tiny()" in info["recipe_source"]
    return folder


def test_help_and_version():
    for args in ([], ["--help"], ["help"]):
        done = call(*args)
        assert done.code == 0 and all(verb in done.out for verb in cli.VERBS)
    assert call("--version").out.startswith("headway 0.")
    for verb in cli.VERBS:
        done = call(verb, "--help")
        assert done.code == 0 and f"usage: headway {verb}" in done.out, verb


# runs


@pytest.mark.parametrize("asked", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_sleep_soon_unless_told_otherwise(monkeypatch, asked):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["headway", "--version"])
    with pytest.raises(SystemExit):
        cli.run()
    expected = asked.get("GOMP_SPINCOUNT", None if asked else cli.SPINS)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_a_run_is_not_overwritten_silently(run, place):
    recipe = f"{place}/tiny.py:tiny"
    assert "already holds a run" in mistake("train", recipe, "--run", run)


def test_eval_reads_run_and_checkpoint(run, place):
    whole = call("eval", run, "--json")
    assert whole.code == 0
    one = call("eval", run / "checkpoints" / "step-000006", "--json")
    assert one.json["val_bits_per_byte"] == whole.json["val_bits_per_byte"]
    again = call("eval", run, "--tokens", 128, "--json").json["val_bits_per_byte"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [r["val_bits_per_byte"] for r in records if "val_bits_per_byte" in r][-1]
    assert again == pytest.approx(last, rel=1e-6)  # the same eight windows as in the loop
    other = call("eval", run, "--data", place / "tiny.py", place / "text.txt", "--json")
    assert other.code == 2 or other.json["data"][0].endswith("tiny.py")
    assert "below 0" in mistake("eval", run, "--tokens", -1)


def test_sample_streams_the_same_text_for_a_seed(run):
    args = ("sample", run, "--prompt", "def ", "--tokens", 12, "--json")
    first, second = call(*args), call(*args)
    assert first.code == 0 and first.json == second.json
    assert first.out.startswith("def " + first.json["text"])
    greedy = [
        call("sample", run, "--temperature", 0, "--tokens", 5, "--seed", s, "--json").json["text"]
        for s in (0, 1)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    "section, changes, said",
    [
        ("run", {"device": "cuda"}, "trained with run.device=cuda"),
        ("run", {"strict": True, "dtype": "bfloat16"}, ""),
        ("model.moe", {"precision": "float8"}, "trained with precision=float8, which needs"),
        ("run", {"strict": True, "device": "cuda", "compile": True}, "run.device=cuda"),
    ],
)
def test_runs_of_other_machines_are_evaluated_and_sampled(run, tmp_path, section, changes, said):
    """As the same weights in this machine's own run are."""
    shutil.copytree(run, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    node = info["config"]
    for part in section.split("."):
        node = node[part]
    node.update(changes)
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    for verb in ("eval", "sample"):
        want = call(verb, run, "--dtype", "float32", "--json").json
        here = call(verb, tmp_path / "run", "--dtype", "float32", "--json")
        assert here.code == 0 and here.err.count("\n") == (1 if said else 0), here
        assert said in here.err
        del want["checkpoint"]
        assert here.json.items() >= want.items()


def test_eval_and_sample_take_a_device_and_a_dtype(run):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        done = call("eval", run, "--dtype", dtype, "--device", "cpu", "--json").json
        assert (done["device"], done["dtype"]) == ("cpu", dtype)
        losses[dtype] = done["val_loss"]
        assert call("sample", run, "--tokens", 3, "--dtype", dtype, "--json").json["dtype"] == dtype
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=1e-2)
    if not torch.cuda.is_available():
        assert "use --device cpu" in mistake("eval", run, "--device", "cuda")
        assert "use --device cpu" in mistake("sample", run, "--device", "cuda")


def test_emulated_bfloat16_is_not_asked_for(run, tmp_path, monkeypatch):
    """A run in bfloat16, on a CPU that only emulates it."""
    shutil.copytree(run, tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    info["config"]["run"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    monkeypatch.setattr("headway.checkpoint.runtime.native_bfloat16", lambda _: False)
    done = call("eval", tmp_path / "run", "--json")
    assert done.json["dtype"] == "float32" and "emulates: in float32" in done.err


def test_resume_of_a_finished_run_changes_nothing(run):
    before = (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
    done = call("train", "--resume", run, "--json")
    assert done.code == 0 and done.json["steps"] == 6
    assert (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes() == before


def test_resume_names_the_field_that_differs(run, place):
    assert "model.d_model is 16" in mistake("train", "--resume", run, "--model.d-model", 32)
    assert "optim.lr is 0.001" in mistake("train", "--resume", run, "--optim.lr", 1)
    assert "run.seed is 0" in mistake("train", "--resume", run, "--seed", 1)
    # its losses would be of two texts
    assert "run.eval_tokens is 128" in mistake("train", "--resume", run, "--run.eval-tokens", 0)
    assert "model.n_layers is 1 in" in mistake("train", "demo", "--resume", run)


def test_resume_may_go_on_longer(run, place):
    longer = place / "runs" / "longer"
    shutil.copytree(run, longer)
    done = call("train", f"{place}/tiny.py:tiny", "--resume", longer, "--steps", 8, "--json")
    assert done.code == 0 and done.json["steps"] == 8


def test_report_of_several_runs(run, tmp_path):
    out = tmp_path / "both.html"
    done = call("report", run, run, "--out", out, "--json")
    assert done.code == 0 and done.json["report"] == str(out) and out.stat().st_size > 10_000
    assert "Ranked by validation bits/byte on 8 of" in done.out
    assert sorted(done.json["ranking"]) == ["runs/first", "runs/first (2)"]
    alone = call("report", run, "--json")
    assert alone.code == 0 and (run / "report.html").is_file()
    assert alone.json["ranking"] is None and "anked" not in alone.out


def test_tokenize_makes_a_tokenizer_that_trains(place):
    out = place / "bpe.json"
    done = call(
        "tokenize", "--data", place / "text.txt", "--vocab-size", 300, "--out", out, "--json"
    )
    assert done.code == 0 and done.json["vocab_size"] <= 300 and done.json["bytes_per_token"] > 1.2
    run = place / "runs" / "bpe"
    args = ("--data.tokenizer", out, "--run", run, "--steps", 2, "--json")
    trained = call("train", f"{place}/tiny.py:tiny", *args)
    assert (
        trained.code == 0 and trained.json["val_bits_per_byte"] < trained.json["val_loss"] / 0.6931
    )


def test_shards_made_ahead_are_those_of_training(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    shards = call("tokenize", "--shards", "--data", place / "text.txt", "--json")
    assert shards.code == 0 and len(shards.json["shards"]) == 1
    run = place / "runs" / "ahead"
    trained = call("train", f"{place}/tiny.py:tiny", "--run", run, "--steps", 1)
    assert trained.code == 0 and "tokenised" not in trained.out
    total = shards.json["train_tokens"] + shards.json["val_tokens"]
    assert total == (place / "text.txt").stat().st_size + 2


def test_name_of_a_file_that_is_not_utf8(place, tmp_path):
    """It is trained on, resumed and reported, and printed where stdout takes nothing else."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text((place / "text.txt").read_text())
    run = tmp_path / "run"
    assert (
        call("train", f"{place}/tiny.py:tiny", "--data", path, "--run", run, "--steps", 1).code == 0
    )
    assert json.loads((run / "run.json").read_text())["config"]["data"]["source"] == [path]
    assert call("train", "--resume", run, "--steps", 2, "--json").json["steps"] == 2
    assert call("report", run).code == 0
    command = [sys.executable, "-m", "headway", "tokenize", "--shards", "--data", path]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0 and rb"caf\udce9.txt: 1 file" in done.stdout


def test_describe_equals_the_trained_model(run, place):
    done = call("describe", f"{place}/tiny.py:tiny", "--P", 2, "--json")
    assert done.code == 0
    counted = json.loads((run / "run.json").read_text())["parameters"]
    assert done.json["parameters"] == counted["total"]
    assert done.json["active_parameters"] == counted["active"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for r in (r for r in records if "loss" in r):
        per_token = r["flops_per_second"] / r["tokens_per_second"]
        assert per_token == pytest.approx(done.json["flops_per_token_training"], rel=1e-12)
    assert done.json["traffic_bytes_per_token_and_layer"]["Head Parallel"] == 4 * 16 * 2 // 2
    more = call("describe", f"{place}/tiny.py:tiny", "--model.moe.n-experts", 8, "--json").json
    assert (
        more["active_parameters"] == counted["active"] + 4 * 16
    )  # only the router grew: 4 rows of width 8, two heads


def test_doctor():
    done = call("doctor", "--json")
    facts = done.json
    assert done.code == 0 and facts["matmul_gflops"]["float32"] > 0
    assert set(facts["extras"]) == {"gpu", "hf", "data", "dev"}
    assert (facts["dtype"] == "bfloat16") == facts["native_bfloat16"]
    for name, extra in facts["extras"].items():
        assert not extra["missing"] or f"pip install 'headway[{name}]'" in done.out


def test_a_failed_run_exits_1(place, monkeypatch):
    from headway.config import RunError
    from headway.train import loop

    def fails(*_, **__):
        raise RunError("20 steps in a row were skipped")

    monkeypatch.setattr(loop, "train", fails)
    done = call("train", f"{place}/tiny.py:tiny", "--run", place / "runs" / "fails")
    assert done.code == 1 and done.err == "headway: 20 steps in a row were skipped\n"
