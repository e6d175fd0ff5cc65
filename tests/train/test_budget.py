"""A budget is a number of steps before step 0, met to less than a step; branches of a trunk are runs of their own."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headway.config import Config, DataConfig, MeshConfig, OptimConfig, UsageError
from headway.optim.schedule import begin_alike, lr_factor, steps_before_fall
from headway.report.sinks import read_metrics
from headway.train.budget import Budget
from tests.train.tiny_run import WALL_CLOCK, records, tiny, train

CONFIG = Config(data=DataConfig(seq_len=32, batch_size=4))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("400steps", Budget(steps=400)),
        ("20Mtokens", Budget(tokens=20e6)),
        ("1e13flops", Budget(flops=1e13)),
        ("2cpu-min", Budget(cpu_seconds=120)),
        ("1.5Mtokens", Budget(tokens=1.5e6)),
    ],
)
def test_what_people_write(text, want):
    assert Budget.parse(text) == want


@pytest.mark.parametrize(
    "text", ["400", "steps", "0steps", "1.5steps", "2 hours", "-3steps", "1..5flops"]
)
def test_what_is_no_budget(text):
    with pytest.raises(UsageError, match="budget"):
        Budget.parse(text)
    with pytest.raises(UsageError, match="'0.0Mtokens' is nothing"):
        Budget.parse("0.0Mtokens")
    with pytest.raises(UsageError, match="one of steps"):
        Budget(steps=3, tokens=3)


def test_the_last_step_is_as_small_as_it_takes():
    """4 sequences of 32 tokens in a step."""
    fitted = Budget(tokens=32 * 11).fit(CONFIG, 1.0)
    assert (fitted.optim.steps, fitted.data.last_batch_size) == (3, 3)
    fitted = Budget(flops=7.0 * 32 * 8).fit(CONFIG, 7.0)
    assert (fitted.optim.steps, fitted.data.last_batch_size) == (2, 0)
    fitted = Budget(cpu_seconds=10).fit(CONFIG, 7.0, step_seconds=0.3)
    assert (fitted.optim.steps, fitted.data.last_batch_size) == (33, 0)
    mesh = dataclasses.replace(CONFIG, mesh=MeshConfig(dp=2))
    assert Budget(tokens=32 * 11).fit(mesh, 1.0).data.last_batch_size == 2
    with pytest.raises(UsageError, match="less than a step"):
        Budget(tokens=32 * 3).fit(CONFIG, 1.0)


def test_a_smaller_last_step_is_trained_and_counted(tmp_path):
    whole = tiny(
        tmp_path,
        optim={"steps": 3, "schedule": "cosine", "min_lr_ratio": 1.0},
        run={"log_every": 1},
    )
    config = dataclasses.replace(whole, data=dataclasses.replace(whole.data, last_batch_size=2))
    result = train(config)
    assert result["tokens"] == (4 + 4 + 2) * 32
    assert [r["tokens"] for r in records(tmp_path) if "loss" in r] == [128, 256, 320]
    one = {"optim": {"steps": 1}, "data": {"batch_size": 2}}
    of_two = load_file(
        Path(train(tiny(tmp_path / "two", **one))["checkpoint"]) / "model.safetensors"
    )
    one = {"optim": {"steps": 1}, "data": {"batch_size": 4, "last_batch_size": 2}}
    rest = load_file(
        Path(train(tiny(tmp_path / "rest", **one))["checkpoint"]) / "model.safetensors"
    )
    assert all(torch.equal(of_two[name], rest[name]) for name in rest)
    micro = dataclasses.replace(config.data, last_batch_size=1)
    assert train(dataclasses.replace(config, data=micro), overwrite=True)["tokens"] == 9 * 32
    with pytest.raises(UsageError, match="last_batch_size=3"):
        micro = dataclasses.replace(config.data, last_batch_size=3)
        train(dataclasses.replace(config, data=micro), overwrite=True)
    with pytest.raises(UsageError, match="last_batch_size=5"):
        dataclasses.replace(config.data, last_batch_size=5).check()


def test_warm_up_in_steps_is_shared_by_lengths():
    short, long = (OptimConfig(steps=n, warmup_steps=5, decay=0.4) for n in (40, 100))
    assert [lr_factor(i, short) for i in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    fall = steps_before_fall(short)
    assert begin_alike(short, long, fall) and not begin_alike(short, long, fall + 1)
    assert not begin_alike(*(OptimConfig(steps=n, warmup=0.2) for n in (40, 100)), 12)


def test_a_branch_off_the_trunk_is_a_run_of_its_own(tmp_path):
    """Bit for bit: the trunk is only shared work. The trunk itself goes on as if it had no branches."""
    optim = {"warmup_steps": 2, "decay": 0.5}
    trunk = tiny(tmp_path / "trunk", optim={**optim, "steps": 16})
    fall = steps_before_fall(dataclasses.replace(trunk.optim, steps=10))
    end = train(trunk, forks=[fall])
    alone = train(tiny(tmp_path / "trunk-alone", optim={**optim, "steps": 16}))
    kept = tmp_path / "trunk" / "run" / "checkpoints" / f"step-{fall:06d}"
    branch = train(tiny(tmp_path / "branch", optim={**optim, "steps": 10}), resume=kept)
    own = train(tiny(tmp_path / "own", optim={**optim, "steps": 10}))
    for one, other in ((end, alone), (branch, own)):
        for name in ("model.safetensors", "optimizer.safetensors"):
            a, b = (load_file(Path(r["checkpoint"]) / name) for r in (one, other))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert one["val_loss"] == other["val_loss"]
    written = [
        r for r in read_metrics(tmp_path / "branch" / "run" / "metrics.jsonl") if "event" not in r
    ]
    assert [{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in written] == records(
        tmp_path / "own"
    )


def test_a_model_is_edited_once_it_has_values(tmp_path):
    def twice(model):
        model.head.weight.mul_(2.0)

    config = tiny(tmp_path, optim={"steps": 1})
    plain = train(config)
    edited = train(config, overwrite=True, edit=twice)
    assert edited["first_val_bits_per_byte"] != plain["first_val_bits_per_byte"]
