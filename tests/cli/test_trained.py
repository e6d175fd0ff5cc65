"""What `eval` and `sample` share: devices and dtypes, runs of other machines."""

import json
import shutil

import pytest
import torch

from tests.command import call, mistake


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
