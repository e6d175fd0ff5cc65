"""What the verbs that read a trained model share: what holds it, devices, dtypes, runs of other
machines."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from tests.command import call, mistake
from tests.hub.small_runs import MODELS, export, write_run


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
        want.pop("tokens_per_second", None)
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


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One model as a run folder, a checkpoint and a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("forms")
    write_run(folder / "run", replace(MODELS["multi_head_token"], vocab_size=257))
    export(folder / "run", folder / "hf")
    (folder / "text.txt").write_text("a text of many words\n" * 400)
    return folder / "run", folder / "run" / "checkpoints" / "step-000003", folder / "hf"


@pytest.mark.parametrize(
    "verb, options, names",
    [
        ("sample", "--prompt the --tokens 12", "text tokens"),
        ("eval", "--data {text} --tokens 256", "val_loss val_bits_per_byte"),
        ("describe", "", "parameters active_parameters flops_per_token_forward"),
        ("describe", "--decode --batch 1,2 --bandwidth 10 --context 8", "batches"),
        ("chat", "--tokens 5", "messages"),
        ("export", "--to {out}", "model_type"),
        ("export", "--to {out} --as headway --dtype float32", "model_type"),
    ],
)
def test_a_verb_reads_runs_checkpoints_and_hugging_face_folders(
    forms, tmp_path, monkeypatch, verb, options, names
):
    """And answers the same. (`serve` too: tests/server.)"""
    answers = []
    for i, path in enumerate(forms):
        if verb == "chat":
            pytest.importorskip("jinja2")
            monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        words = options.format(text=forms[0].parent / "text.txt", out=tmp_path / str(i)).split()
        done = call(verb, path, *words, "--json")
        assert done.code == 0, done
        answers.append([done.json[name] for name in names.split()])
    # the folder says the softmax over the chosen experts as one over all that is renormalised
    of_folder = pytest.approx(answers[0], rel=1e-7) if verb == "eval" else answers[0]
    assert answers[0] == answers[1] and answers[2] == of_folder
    if verb == "export":
        files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
        assert files[0] == files[1] == files[2]


def test_what_is_no_trained_model_is_said(forms, tmp_path):
    (tmp_path / "file").touch()
    for name, reason in (("file", "is a file"), ("step-000009", "does not exist")):
        for verb in ("sample", "eval", "export --to x", "serve", "chat"):
            verb, *rest = verb.split()
            assert f"{name} {reason}; give a run" in mistake(verb, tmp_path / name, *rest)
    assert "holds neither run.json nor config.json" in mistake("sample", tmp_path)
    fix = f"import it first: headway import {forms[2]} --to RUN"
    assert fix in mistake("train", "--resume", forms[2])
    assert "changes a recipe" in mistake("describe", forms[2], "--optim.steps", 3)
