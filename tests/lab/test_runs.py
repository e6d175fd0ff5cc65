"""Runs of several lengths on one trunk: the same bits as alone, whatever was killed."""

import dataclasses

import numpy as np
import pytest
import torch

from headway.config import UsageError
from headway.data.tokenizer import load_tokenizer
from headway.kernels.precision import native_bfloat16
from headway.lab.folder import Wanted, errors
from headway.lab.rows import check_texts
from headway.lab.runs import OtherDtypeError, Run, documents, execute, execute_branches
from headway.lab.worker import work
from headway.lab.workers import Workers
from headway.report.sinks import read_metrics
from headway.train.resolve import resolve
from headway.train.session import Session
from tests.train.tiny_run import quiet, tiny


@pytest.fixture
def runs(tmp_path):
    def of(steps: int, decay: float = 0.4) -> Run:
        config = tiny(tmp_path, optim={"steps": steps, "warmup_steps": 2, "decay": decay})
        return Run(resolve(config, load_tokenizer("bytes").vocab_size).config)

    return of


def auto(run: Run) -> Run:
    """The run in the dtype that its machine chooses."""
    return Run(
        dataclasses.replace(run.config, run=dataclasses.replace(run.config.run, dtype="auto"))
    )


def test_a_result_says_what_the_machine_chose(tmp_path, runs):
    native = native_bfloat16(torch.device("cpu"))
    assert execute(auto(runs(4)), tmp_path)["auto_dtype"] == ("bfloat16" if native else "float32")
    assert execute(runs(4), tmp_path)["auto_dtype"] is None
    rows = [{"corpus": "a", "validation": "v", "auto_dtype": x} for x in ("float32", "bfloat16")]
    with pytest.raises(UsageError, match="are not compared; set run.dtype to float32"):
        check_texts(rows)
    older = {"corpus": "a", "validation": "v"}  # of which nothing is known
    check_texts([rows[0], older])


def test_a_folder_of_machines_with_another_dtype_takes_no_run(tmp_path, runs):
    """Before anything is trained, and not as a failure of the run; one that says its dtype may. So
    too where the other machine's run is not finished, and where it is this very one."""
    first = execute(auto(runs(4)), tmp_path)
    here = first["auto_dtype"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[here]
    folder = tmp_path / "runs" / first["config_hash"]
    text = (folder / "run.json").read_text()
    assert f'"run.dtype": "{here}: ' in text
    (folder / "run.json").write_text(
        text.replace(f'"run.dtype": "{here}', f'"run.dtype": "{other}')
    )
    assert execute(auto(runs(4)), tmp_path)["seconds"] == first["seconds"]  # it is there
    for finished in (True, False):
        if not finished:
            (folder / "result.json").unlink()
        with pytest.raises(OtherDtypeError, match=f"is {here} on this machine, and was {other}"):
            execute(auto(runs(6 if finished else 4)), tmp_path)
        assert list((tmp_path / "runs").iterdir()) == [folder]
    assert execute(runs(4), tmp_path)["auto_dtype"] is None
    with Workers(tmp_path, 1, log=quiet) as workers:
        run = auto(runs(6))
        workers.ask(run.key, Wanted(run.config))
        with pytest.raises(OtherDtypeError):
            work(workers.queue, ends=True)
        assert not errors(tmp_path / "runs" / run.key)


def test_a_run_whose_last_step_diverges_is_named(tmp_path, runs):
    """Its steps were finite, or skipped, and fewer than `optim.max_skipped` in a row; the model
    that is evaluated gives no number."""
    config = runs(4).config
    optim = dataclasses.replace(config.optim, lr=1e30)
    run = dataclasses.replace(config.run, sample_tokens=0)  # as in experiments
    result = execute(Run(dataclasses.replace(config, optim=optim, run=run)), tmp_path)
    assert result["bits_per_byte"] is result["val_loss"] is None
    assert result["error"] == "the validation loss is not finite"


def test_branches_are_the_runs_that_they_stand_for(tmp_path, runs):
    family = [runs(10), runs(20), runs(14)]
    shared = execute_branches(family, tmp_path / "shared")
    alone = [execute(run, tmp_path / "alone") for run in family]
    assert [r["steps"] for r in shared] == [10, 20, 14]
    for run, a, b in zip(family, shared, alone, strict=True):
        assert a["bits_per_byte"] == b["bits_per_byte"] and a["tokens"] == b["tokens"]
        x, y = (documents(tmp_path / place, run.key) for place in ("shared", "alone"))
        assert np.array_equal(x.nats_N, y.nats_N)
        assert not list((tmp_path / "shared" / "runs" / run.key).glob("checkpoints/*"))
        events = [
            r["detail"]
            for r in read_metrics(tmp_path / "shared" / "runs" / run.key / "metrics.jsonl")
            if r.get("event") == "resumed"
        ]
        fall = {10: "step-000006", 14: "step-000008"}.get(a["steps"])
        assert len(events) == (fall is not None) and all(fall in text for text in events)
    again = execute_branches(family, tmp_path / "shared")
    assert [(r["config_hash"], r["attempts"]) for r in again] == [(run.key, 1) for run in family]


def test_a_trunk_that_was_killed_keeps_what_it_left(tmp_path, runs, monkeypatch):
    family, fork, left = [runs(10), runs(20), runs(14)], Session.fork, []

    def killed(session):
        left.append(fork(session))
        if len(left) == 2:
            raise MemoryError
        return left[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Session, "fork", killed)
        with pytest.raises(MemoryError):
            execute_branches(family, tmp_path / "shared")
    again = execute_branches(family, tmp_path / "shared")
    assert [r["continued"] for r in again] == [6, 0, 8]
    assert [r["attempts"] for r in again] == [1, 2, 1]
    alone = [execute(run, tmp_path / "alone") for run in family]
    assert [r["bits_per_byte"] for r in again] == [r["bits_per_byte"] for r in alone]


def test_the_untrained_model_is_evaluated_only_with_others(tmp_path, runs):
    def evaluated(every: int) -> list[int]:
        run = runs(10)
        changed = dataclasses.replace(run.config.run, eval_every=every)
        run = Run(dataclasses.replace(run.config, run=changed))
        root = tmp_path / str(every)
        execute(run, root)
        records = read_metrics(root / "runs" / run.key / "metrics.jsonl")
        return [r["step"] for r in records if "val_loss" in r]

    assert (evaluated(5), evaluated(10)) == ([0, 5, 10], [10])


def test_what_begins_otherwise_is_trained_alone(tmp_path, runs):
    other = runs(10, decay=0.4)
    optim = dataclasses.replace(other.config.optim, lr=1e-4)
    other = Run(dataclasses.replace(other.config, optim=optim))
    results = execute_branches([runs(20), other], tmp_path / "shared")
    assert results[1]["bits_per_byte"] == execute(other, tmp_path / "alone")["bits_per_byte"]
