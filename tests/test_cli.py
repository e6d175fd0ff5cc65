"""The command line: exit codes, one-line mistakes, JSON as the last line; mostly in this process, since torch is slow to
import."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from headway import cli, options
from headway.config import Config
from headway.options import override, take
from headway.parallel.agreement import leaves

RECIPE = """
from headway.config import Config, DataConfig, MoEConfig, ModelConfig, OptimConfig, RunConfig

def tiny():
    return Config(
        recipe="tiny",
        model=ModelConfig(n_layers=1, d_model=16, n_heads=2,
                          moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_heads=2)),
        data=DataConfig(source=(SOURCE,), seq_len=16, batch_size=4),
        optim=OptimConfig(steps=6),
        run=RunConfig(log_every=2, eval_batches=2, sample_tokens=8),
    )

NOT_A_CONFIG = 3
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])


def call(*args: object) -> Done:
    """`headway ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in args])
    return Done(code, out.getvalue(), err.getvalue())


def mistake(*args: object) -> str:
    """The one line that a wrong call costs."""
    done = call(*args)
    assert done.code == 2, done
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("headway: "), done.err
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text and a recipe."""
    folder = tmp_path_factory.mktemp("cli")
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 7}\n\n" for i in range(900))
    (folder / "text.txt").write_text(text)
    (folder / "tiny.py").write_text(RECIPE.replace("SOURCE", repr(str(folder / "text.txt"))))
    return folder


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


# options


def test_shorthands_name_leaves_that_exist():
    known = leaves(Config().to_dict())
    for leaf in options.SHORTHANDS.values():
        assert leaf.strip("-").replace("-", "_") in known


def test_overrides_reach_their_leaves():
    made = override(
        Config(recipe="x"),
        "--model.moe.top-k 7 --model.moe.router.gate sigmoid --model.window 3 0 --data a b --steps 9 --seed=4 "
        "--checkpoint-every 2 --run here --mesh hp=2,ep=4 --model.no-qk-norm --run.compile --model.d_model 64".split(
            " "
        ),
        "headway train x",
    )
    assert made.model.moe.top_k == 7 and made.model.moe.router.gate == "sigmoid"
    assert made.model.window == (3, 0) and made.data.source == ("a", "b")
    assert (made.optim.steps, made.run.seed, made.run.checkpoint_every, made.run.dir) == (
        9,
        4,
        2,
        "here",
    )
    assert (made.mesh.dp, made.mesh.hp, made.mesh.ep) == (1, 2, 4)
    assert not made.model.qk_norm and made.run.compile and made.model.d_model == 64
    untouched = replace(
        Config(recipe="x"), model=made.model, data=made.data, optim=made.optim, run=made.run
    )
    assert replace(untouched, mesh=made.mesh) == made


def test_every_leaf_is_an_option(capsys):
    assert cli.main(["train", "demo", "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in leaves(Config().to_dict()):
        head, _, tail = leaf.replace("_", "-").rpartition(".")
        assert f"--{head}.{tail}" in text if head else f"--{tail}" in text


def test_take():
    assert take(["a", "--resume", "x", "b"], "--resume") == ("x", ["a", "b"])
    assert take(["--resume=x"], "--resume") == ("x", [])
    assert take(["a"], "--resume") == (None, ["a"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("trian", "unknown verb 'trian'; did you mean train?"),
        ("train", "needs a recipe or --resume RUN"),
        ("train dmo", "unknown recipe 'dmo'; did you mean demo?"),
        (
            "train demo --model.moe.topk 4",
            "unknown option --model.moe.topk; did you mean --model.moe.top-k?",
        ),
        ("train demo --top-k 4", "unknown option --top-k; did you mean --model.moe.top-k?"),
        ("train demo --stesp 4", "did you mean --steps?"),
        ("train demo --zzz", "unknown option --zzz; --help lists all options"),
        ("train demo --model.moe.top-k four", "--model.moe.top-k"),
        ("train demo --model.moe.kind foo", "invalid choice 'foo' for argument '--model.moe.kind'"),
        ("train demo --model.moe.top-k", "missing value for argument '--model.moe.top-k'"),
        ("train demo extra", "unrecognized options: extra"),
        ("train demo --model.moe.top-k 33", "top_k=33 must lie between 1 and n_experts=32"),
        ("train demo --mesh hp=3", "mesh needs hp=3 to divide n_heads=4; use hp=1, 2 or 4"),
        ("train demo --mesh hp=2", "needs 2 processes and there is 1; start it with: torchrun"),
        ("train demo --mesh xp=2", "no AXIS=N[,AXIS=N]"),
        ("train demo --resume", "--resume needs a value"),
        ("train demo --resume /nowhere/run", "/nowhere/run"),
        ("train --resume /nowhere --overwrite", "use one"),
        ("train /nowhere/file.py:f", "there is no file /nowhere/file.py"),
        ("train demo --data /nowhere/text", "/nowhere/text"),
        ("eval /nowhere", "neither a run folder nor a checkpoint"),
        ("eval", "missing from headway eval: RUN"),
        ("sample /nowhere --temperature -1", "temperature=-1"),
        ("sample /nowhere --top-p 2", "top_p=2"),
        ("sample /nowhere --tokens 0", "--tokens 0 is below 1"),
        ("tokenize --vocab-size 12", "vocab_size 12 is too small"),
        ("tokenize --data /nowhere", "/nowhere"),
        ("tokenize --vocab-size twelve", "--vocab-size"),
        ("report /nowhere", "/nowhere"),
        ("describe", "describe needs a recipe"),
        ("describe demo --P one", "--P one"),
        ("describe demo --P 1", "--P 1 ranks"),
        ("doctor --jsn", "unknown option --jsn; did you mean --json?"),
        ("doctor --measure /nowhere/m.json", "there is no folder /nowhere"),
        ("plan", "plan needs a recipe"),
        ("plan demo", "plan needs --gpus N"),
        ("plan demo --gpus 0", "--gpus 0 is no whole number"),
        ("plan demo --gpus 3", "batch_size=8 does not divide among --gpus 3"),
        ("plan demo --gpus 2 --gpu v100", "--gpu v100 is unknown; use h100"),
        ("plan demo --gpus 2 --network slow", "--network slow is neither Gbit/s"),
        ("plan demo --gpus 2 --machine /nowhere", "--machine /nowhere: there is no such file"),
        ("plan demo --gpus 2 --scheme best", "--scheme best is unknown; use auto, all_to_all"),
        ("plan demo --gpus 2 --imbalance 0.5", "--imbalance 0.5 is no number ≥ 1"),
        ("plan demo --gpus 2 --mesh hp=2", "leave --mesh out"),
        ("plan demo --gpus 2 --modle.d-model 4", "did you mean --model.d-model?"),
    ],
)
def test_mistakes_cost_one_line(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in mistake(*args.split())
    assert not list(tmp_path.rglob("metrics.jsonl"))  # nothing was started


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Missing argument ───╮\n│ Missing value for    │\n│ argument '--a'.      │\n│ ──────────── │\n│ see --help │\n╰──╯\n",
        " Missing argument  \n ----------------- \n  Missing value for\n  argument '--a'. \n  -------\n  see --help  \n\n",
    ],
)
def test_boxes_become_one_line(box):
    """Drawn with lines on a terminal in UTF-8, with dashes elsewhere."""
    assert options._unboxed(box) == "missing value for argument '--a'"


def test_help_and_version():
    for args in ([], ["--help"], ["help"]):
        done = call(*args)
        assert done.code == 0 and all(verb in done.out for verb in cli.VERBS)
    assert call("--version").out.startswith("headway 0.")
    for verb in cli.VERBS:
        assert call(verb, "--help").code == (2 if verb == "describe" else 0), verb


def test_recipe_file_mistakes(place):
    assert "names no function" in mistake("train", f"{place}/tiny.py")
    assert "has no function big" in mistake("train", f"{place}/tiny.py:big")
    assert "it has" in mistake("train", f"{place}/tiny.py:NOT_A_CONFIG")


# runs


def test_a_run_is_not_overwritten_silently(run, place):
    recipe = f"{place}/tiny.py:tiny"
    assert "already holds a run" in mistake("train", recipe, "--run", run)


def test_eval_reads_run_and_checkpoint(run, place):
    whole = call("eval", run, "--json")
    assert whole.code == 0
    one = call("eval", run / "checkpoints" / "step-000006", "--json")
    assert one.json["val_bits_per_byte"] == whole.json["val_bits_per_byte"]
    again = call("eval", run, "--batches", 2, "--json").json["val_bits_per_byte"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [r["val_bits_per_byte"] for r in records if "val_bits_per_byte" in r][-1]
    assert again == pytest.approx(last, rel=1e-6)  # the same two batches as in the loop
    other = call("eval", run, "--data", place / "tiny.py", place / "text.txt", "--json")
    assert other.code == 2 or other.json["data"][0].endswith("tiny.py")
    assert "below 0" in mistake("eval", run, "--batches", -1)


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


def test_resume_of_a_finished_run_changes_nothing(run):
    before = (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
    done = call("train", "--resume", run, "--json")
    assert done.code == 0 and done.json["steps"] == 6
    assert (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes() == before


def test_resume_names_the_field_that_differs(run, place):
    assert "model.d_model is 16" in mistake("train", "--resume", run, "--model.d-model", 32)
    assert "optim.lr is 0.001" in mistake("train", "--resume", run, "--optim.lr", 1)
    assert "run.seed is 0" in mistake("train", "--resume", run, "--seed", 1)
    assert "model.n_layers is 1 in" in mistake("train", "demo", "--resume", run)


def test_resume_may_go_on_longer(run, place):
    import shutil

    longer = place / "runs" / "longer"
    shutil.copytree(run, longer)
    done = call("train", f"{place}/tiny.py:tiny", "--resume", longer, "--steps", 8, "--json")
    assert done.code == 0 and done.json["steps"] == 8


def test_report_of_several_runs(run, tmp_path):
    out = tmp_path / "both.html"
    done = call("report", run, run, "--out", out, "--json")
    assert done.code == 0 and done.json["report"] == str(out) and out.stat().st_size > 10_000
    assert call("report", run).code == 0 and (run / "report.html").is_file()


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


def test_describe_equals_the_trained_model(run, place):
    done = call("describe", f"{place}/tiny.py:tiny", "--P", 2, "--json")
    assert done.code == 0
    counted = json.loads((run / "run.json").read_text())["parameters"]
    assert done.json["parameters"] == counted["total"]
    assert done.json["active_parameters"] == counted["active"]
    assert done.json["traffic_bytes_per_token_and_layer"]["Head Parallel"] == 4 * 16 * 2 // 2
    more = call("describe", f"{place}/tiny.py:tiny", "--model.moe.n-experts", 8, "--json").json
    assert (
        more["active_parameters"] == counted["active"] + 4 * 16
    )  # only the router grew: 4 rows of width 8, two heads


def test_plan_lists_meshes():
    done = call("plan", "large", "--gpus", 64, "--gpu", "h100", "--json")
    found = done.json
    assert done.code == 0 and len(found["meshes"]) > 20 and found["best"]["fits"]
    assert found["dtype"] == "bfloat16" and "ms per step" in done.out
    assert "hp=16 does not divide n_heads=8" in done.out
    assert "assumed, not measured: latency" in done.out and "vendor's: peak" in done.out
    slow = call("plan", "large", "--gpus", 64, "--network", 10, "--json").json
    for row in slow["meshes"]:
        if "between nodes" in row["links"].values():
            twin = next(
                r
                for r in found["meshes"]
                if all(r[key] == row[key] for key in ("mesh", "scheme", "replicas"))
            )
            assert row["step_seconds"] > twin["step_seconds"]


def test_plan_takes_overrides_and_exits_1_when_nothing_fits():
    args = ("plan", "demo", "--gpus", 2, "--gpu", "cpu", "--json")
    found = call(*args).json
    assert found["dtype"] == "float32"
    assert {r["mesh"] for r in found["meshes"]} == {
        "dp=2,hp=1,ep=1",
        "dp=1,hp=2,ep=1",
        "dp=1,hp=1,ep=2",
    }
    wider = call(*args, "--model.moe.d-expert", 128).json
    before, after = found["best"]["parameters"], wider["best"]["parameters"]
    assert after - before == 4 * 4 * 32 * 3 * 64 * 48 // 2
    big = call("plan", "large", "--gpus", 1, "--gpu", "cpu", "--json")
    assert big.code == 1 and big.json["best"] is None and "no mesh fits" in big.out


def test_plan_reads_what_doctor_measured(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "machine.json"
    measured = call("doctor", "--measure", file, "--json")
    assert measured.code == 0 and measured.json == json.loads(file.read_text())
    done = call("plan", "demo", "--gpus", 2, "--machine", file, "--json")
    assert done.code == 0 and done.json["dtype"] == measured.json["dtype"]
    machine = done.json["machine"]
    for name, value in measured.json["measured"].items():
        assert machine[name] == {"value": value, "origin": "measured"}
    assert machine["inter_node"]["origin"] in ("assumed", "vendor") and "measured: " in done.out
    other = "float32" if measured.json["dtype"] == "bfloat16" else "bfloat16"
    words = mistake("plan", "demo", "--gpus", 2, "--machine", file, "--run.dtype", other)
    assert f"was measured in {measured.json['dtype']}" in words


def test_doctor():
    done = call("doctor", "--json")
    found = done.json
    assert done.code == 0 and found["matmul_gflops"]["float32"] > 0
    assert set(found["extras"]) == {"hf", "data", "dev"}
    assert (found["dtype"] == "bfloat16") == found["native_bfloat16"]
    for name, extra in found["extras"].items():
        assert not extra["missing"] or f"pip install 'headway[{name}]'" in done.out


def test_a_failed_run_exits_1(place, monkeypatch):
    from headway.train import loop
    from headway.train.run import RunError

    def fails(*_, **__):
        raise RunError("20 steps in a row were skipped")

    monkeypatch.setattr(loop, "train", fails)
    done = call("train", f"{place}/tiny.py:tiny", "--run", place / "runs" / "fails")
    assert done.code == 1 and done.err == "headway: 20 steps in a row were skipped\n"


def test_read_only_run_folder(place):
    file = place / "a_file"
    file.write_text("")
    assert "a_file" in mistake("train", f"{place}/tiny.py:tiny", "--run", file / "run")


# real processes


def headway(*args: object) -> list[str]:
    return [sys.executable, "-m", "headway", *(str(a) for a in args)]


def test_module_and_exit_codes(tmp_path):
    done = subprocess.run(
        headway("train", "dmo"), capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("headway: unknown recipe 'dmo'") and done.stderr.count("\n") == 1


def test_sigint_saves_exits_130_and_resumes(place):
    folder = place / "runs" / "interrupted"
    args = headway(
        "train",
        f"{place}/tiny.py:tiny",
        "--run",
        folder,
        "--steps",
        100_000,
        "--run.eval-every",
        100_000,
    )
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=environment())
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (
        metrics.is_file() and metrics.read_text().count("\n") > 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"headway train --resume {folder}" in out
    saved = sorted((folder / "checkpoints").glob("step-*"))[-1]
    step = int(saved.name.removeprefix("step-"))
    done = call("train", "--resume", folder, "--steps", step + 1, "--json")
    assert done.code == 0 and done.json["steps"] == step + 1


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
