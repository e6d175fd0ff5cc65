"""What ranks tell one another before step 0, when one is slow and when one hangs."""

import socket
import time

import pytest
import torch
import torch.distributed as dist

from headway.cli import main as cli
from headway.config import MeshConfig, RunError, UsageError
from headway.parallel import watchdog
from headway.parallel.agreement import difference
from headway.parallel.mesh import launch
from headway.parallel.reduce import sum_over
from headway.parallel.straggler import StragglerDetector, slowest
from headway.parallel.traffic import Traffic
from headway.parallel.watchdog import Position, Watchdog, who_is_behind

TWO = MeshConfig(hp=2)


def entered(rank, world, config, facts=({},)):
    """(error type, text) of launching."""
    try:
        with launch(config, facts=lambda: facts[min(rank, len(facts) - 1)]) as mesh:
            return "", f"{mesh.rank} of {mesh}"
    except UsageError as error:
        return type(error).__name__, str(error)


def test_a_launch_places_every_rank(ranks):
    answers = ranks.launched(2, entered, TWO)
    assert answers == [("", f"{r} of dp=1, hp=2, ep=1") for r in range(2)]


@pytest.mark.parametrize(
    "facts, words",
    [
        (
            ({"data.seq_len": 32}, {"data.seq_len": 64}),
            "rank 1 has data.seq_len=64 and rank 0 has 32; ",
        ),
        (
            ({"torch": "2.13.0"}, {"torch": "2.12.0"}),
            "rank 1 has torch=2.12.0 and rank 0 has 2.13.0; ",
        ),
        (({}, {"commit": "abc"}), "rank 1 has commit=abc and rank 0 has nothing; "),
    ],
)
def test_the_first_difference_between_ranks_is_named_once(ranks, facts, words):
    (kind, text), (other, _) = ranks.launched(2, entered, TWO, facts)
    assert kind == "UsageError" and text.startswith(words) and text.endswith("versions and data")
    assert other == "PeerError"


def test_difference_is_that_of_the_first_rank():
    same = {"a": 1, "b": 2}
    assert difference([same, dict(same), dict(same)]) == ""
    assert difference([same, same, {"a": 1, "b": 3}]).startswith("rank 2 has b=3 and rank 0 has 2;")


def test_a_product_that_is_not_the_number_of_processes(ranks):
    text = "mesh dp=1, hp=3, ep=1 needs 3 processes and there are 2; use --mesh with a product of 2"
    (kind, message), (other, _) = ranks.launched(2, entered, MeshConfig(hp=3))
    assert (kind, message, other) == ("UsageError", text, "PeerError")


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set, and RANK or WORLD_SIZE is"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "'two' is no"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "'-1' is no"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "99999"},
            "below 65536",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "use a free port"),
    ],
)
def test_a_wrong_environment_costs_one_line(monkeypatch, capfd, tmp_path, environment, words):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        if "free port" in words:  # rank 0 cannot bind
            environment = {**environment, "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        text = tmp_path / "text.txt"
        text.write_text("All happy families are alike. " * 400)
        args = ["train", "multi_head_latent", "--mesh", "hp=2", "--data", str(text)]
        args += ["--model.moe.n-heads", "2", "--run.device", "cpu", "--run", str(tmp_path / "run")]
        assert cli.main([*args, "--mesh.timeout", "3"]) == 2
    printed = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[W")]
    assert len(printed) == 1 and words in printed[0] and printed[0].startswith("headway: ")
    assert not (tmp_path / "run").exists()


# a rank that hangs


def hangs(rank, world, config):
    """Rank 1 sleeps before its second collective of step 7."""
    try:
        with launch(config) as mesh:
            x = torch.ones(3)
            for step in range(9):
                mesh.begin_step(step)
                sum_over(mesh.hp, x, mesh, "first")
                if step == 7 and rank == 1:
                    time.sleep(config.timeout + 2.5)
                sum_over(mesh.world, x, mesh, "second")
    except RunError as error:
        return str(error)
    return "nothing happened"


def test_a_rank_that_hangs_is_named_with_its_step(ranks):
    answers = ranks.launched(3, hangs, MeshConfig(hp=3, timeout=5.0))
    line = (
        "rank 1 is at step 7 (in hp first) and the others are at step 7 (in world second): "
        "it did not join a collective within 5 s"
    )
    # one of those that wait tells it; rank 1 wakes up when the others have left
    assert sorted((answers[0], answers[2])) == ["", line]
    assert answers[1] in ("", "rank 1 is at step 7, and rank 0, which served all, left")


def test_who_is_behind():
    def at(step, calls=0, heartbeats=1, last="hp scatter", ended=False):
        return Position(step, calls, last, heartbeats, ended)

    before = {0: at(8, 80), 1: at(8, 80), 2: at(7, 71, last="hp gather")}
    now = {rank: p._replace(heartbeats=2) for rank, p in before.items()}
    where = (
        "rank 2 is at step 7 (in hp gather) and the others are at step 8 (in hp scatter): it left"
    )
    assert who_is_behind(before, now, "left") == where
    # stopped: no beat, though as far as the others
    stopped = {**now, 1: before[1]}
    assert who_is_behind(before, stopped, "left").startswith(
        "rank 1 is at step 8 (in hp scatter) and"
    )
    alike = {rank: at(3, 5, heartbeats=rank) for rank in (1, 2)}
    text = who_is_behind({rank: at(3, 5, heartbeats=0) for rank in alike}, alike, "left the job")
    assert text.startswith("all ranks are at step 3 (in hp scatter), and one of them left the job")
    two = who_is_behind(before | {1: before[2]}, now | {1: now[2]}, "left")
    assert two.startswith("ranks 1, 2 are at step 7") and two.endswith("they left")


def test_a_process_that_cannot_be_told_is_ended_by_its_thread(monkeypatch, capfd):
    """As with NCCL: the main thread waits for the device and hears nothing."""
    ended = []
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "HEARTBEAT", 0.02)
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    traffic = Traffic()
    store.set("at/1", '[2, 10, "hp scatter", 5, false]')
    with Watchdog(store, 0, 2, timeout=-4.8, traffic=traffic) as heart:
        traffic.add("hp", "gather", 1)
        heart.begin_step(3)
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended[:1] == [1]
    line = (
        "headway: rank 1 is at step 2 (in hp scatter) and the others are at step 3 (in hp gather)"
    )
    assert line in capfd.readouterr().err


# a rank that is slow


def works(mesh):
    busy, x = StragglerDetector(mesh), torch.ones(1)
    started = time.perf_counter()
    for _ in range(4):
        time.sleep(0.2 if mesh.rank == 2 else 0.1)
        sum_over(mesh.world, x, mesh, "gradients")
    return busy.slow_rank(time.perf_counter() - started)


def test_a_slow_rank_is_named(ranks):
    answers = ranks.run(MeshConfig(dp=3), works)
    assert answers[0].startswith("slow rank: 2 takes ") and answers == [answers[0]] * 3
    assert 1.5 <= float(answers[0].split()[4]) <= 2.5
    assert slowest([1.0, 1.1, 1.4]) == "" and slowest([0.01, 0.01, 0.1]) == ""
    assert slowest([1.0, 1.0, 1.8]).startswith("slow rank: 2 takes 1.8 times the median")
