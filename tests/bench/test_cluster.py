"""The emulated hosts of `bench/cluster.py`, and what it makes of their answers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import cluster, cluster_plot, hosts
from bench.cluster_host import FULL, model_of
from bench.cluster_predict import (
    alone_ms,
    alone_name,
    calibrated,
    predicted,
    scaled,
    with_predictions,
)
from bench.cluster_report import (
    BYTES,
    Case,
    Sample,
    busiest_bytes,
    exchange_formula,
    imbalance,
    prediction_table,
    scaling_row,
    sweep_row,
    targets,
    with_efficiency,
)
from bench.common import ROOT, parameters
from headway.config import MeshConfig

WHY_NOT = hosts.why_not()


def answer(seconds, sent, received, **ledger):
    return {
        "seconds": seconds,
        "cpu": seconds / 2,
        "sent": sent,
        "received": received,
        "ledger": {key.replace("_", " "): {"bytes": n, "wait": 0.001} for key, n in ledger.items()},
    }


def case(name, k, **mesh):
    kind = "multi_head_latent" if name.startswith("HP") else "moe"
    mesh = {"chunks": 2 if name.endswith("2 chunks") else 1, **mesh}
    return Case(name, k, MeshConfig(**mesh), model_of(kind, k, FULL, 4))


def named(name, k):
    """On four hosts."""
    return case(
        name, k, **({"hp": 4} if name.startswith("HP") else {"ep": 4, "dedup": name != "EP"})
    )


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_models_are_equally_large_and_k_times_f_is_constant(k):
    flat, latent, heads = (
        model_of(kind, k, FULL, 4) for kind in ("moe", "latent", "multi_head_latent")
    )
    assert (flat.moe.d_expert * k, latent.moe.d_expert * k, heads.moe.d_expert * k) == (
        512,
        896,
        384,
    )
    active = [parameters(m)[1] for m in (flat, latent, heads)]
    total = [parameters(m)[0] for m in (flat, latent, heads)]
    assert max(active) < 1.02 * min(active)
    assert k == 1 or max(total) < 1.2 * min(total)  # of few wide experts whole numbers are coarse
    assert all(m.moe.n_experts % 4 == 0 for m in (flat, latent, heads))


def test_each_layer_has_its_own_busiest_link():
    """One host is full in the first layer, another in the second: over both they are even."""
    layers = ("ep_dispatch,_layer_0", "ep_dispatch,_layer_1")
    full = [(300, 100), (100, 300)]
    sample = Sample([answer(1, 1, 1, **dict(zip(layers, f, strict=True))) for f in full])
    assert busiest_bytes(sample) == 600 and imbalance(sample) == 1.5


def test_the_busiest_link_of_a_dispatch_is_that_of_its_combine():
    sample = Sample(
        [
            answer(1.0, 0, 0, ep_dispatch=100, ep_combine=300, world_gradients=7),
            answer(1.0, 0, 0, ep_dispatch=120, ep_combine=60, world_gradients=7),
        ]
    )
    assert busiest_bytes(sample) == 300 + 300
    assert imbalance(sample) == 600 / 290
    even = Sample([answer(1.0, 0, 0, hp_scatter=50, hp_gather=40)] * 2)
    assert busiest_bytes(even) == 90 and imbalance(even) == 1.0


def test_formulas_count_layers_and_tokens():
    sub_tokens = FULL.tokens * FULL.n_layers * 3 / 4  # of 4 ranks 3 are elsewhere
    values = 4 * FULL.d_model * 2  # bytes of one sub-token on its 4 ways
    assert exchange_formula(case("HP", 4, hp=4), FULL, 2) == sub_tokens * values
    # each copy has an index of 2 bytes; one per rank has 4 of them, and gates there and back
    per_slot = sub_tokens * 4 * (values + 2)
    assert exchange_formula(case("EP", 4, ep=4, dedup=False), FULL, 2) == pytest.approx(per_slot)
    copies = 4 * (1 - (3 / 4) ** 4)
    per_rank = sub_tokens * copies * (values + 4 * (2 + 2 * 4))
    assert exchange_formula(case("EP dedup", 4, ep=4), FULL, 2) == pytest.approx(per_rank)


def network(mbit, rate):
    """Collectives that take 1 ms and bytes over the rate."""
    points = [[n, 1e-3 + n / rate] for n in (1, 1_000_000)]
    kinds = [("all_to_all", 4, 1), ("all_to_all", 4, 2), ("all_reduce", 4, 1)]
    curves = [
        {"collective": what, "ranks": n, "inside": False, "at_once": at_once, "points": points}
        for what, n, at_once in kinds
    ]
    return {"bench": "network", "mbit": mbit, "curves": curves}


RATES = {"bench": "rates", "oversubscription": 2.0, "dtype": "bfloat16"}
RATES["measured"] = {"peak": 1e11, "memory_bandwidth": 1e10, "experts_efficiency": 0.2}
SINGLE_PROCESS = [
    {"bench": "alone", "name": name, "k": k, "mbit": mbit, "step_ms": 250.0, "cpu_ms": 100.0}
    for name in ("moe", "multi_head_latent")
    for k in (4, 8)
    for mbit in (0.0, 100.0)
]
BESIDE = [RATES, network(0.0, 1e9), network(100.0, 12.5e6), *SINGLE_PROCESS]
NAMES = ("EP", "EP dedup", "EP dedup, 2 chunks", "HP", "HP, 2 chunks")
CASES = [named(name, k) for name in NAMES for k in (4, 8)]


def test_the_machine_is_scaled_to_the_step_of_one_process():
    """Half the time, twice the speed; and the plan of a mesh has that time without the network."""
    hp = case("HP", 4, hp=4)
    machine = calibrated(RATES, [], None)
    slow, fast = (scaled(machine, hp.model, FULL, 2, ms) for ms in (250.0, 125.0))
    assert fast.peak == pytest.approx(2 * slow.peak)
    assert fast.memory_bandwidth == pytest.approx(2 * slow.memory_bandwidth)
    parts = predicted(slow, hp, FULL, 2, 1.0)
    away = ("exposed", "copies", "small sums", "gradients")
    done = sum(ms for name, ms in parts.items() if not any(word in name for word in away))
    # 10 of 40 experts per head in one process, 40 of one head on a host: more for the router alone
    assert 250.0 < done < 260.0


def test_a_step_of_one_process_shares_the_cores():
    """Two ranks per core: 100 ms of the processor last 200 ms, also where other hosts began late."""
    rates = RATES | {"oversubscription": 2.0}
    assert alone_ms({"step_ms": 130.0, "cpu_ms": 100.0}, rates) == 200.0
    assert alone_ms({"step_ms": 230.0, "cpu_ms": 100.0}, rates) == 230.0


def test_predictions_come_from_rows_alone():
    predictions = with_predictions([*BESIDE, *rows()], CASES, FULL)
    hp = {
        r["mbit"]: r
        for r in predictions
        if r["bench"] == "sweep" and (r["name"], r["k"]) == ("HP", 4)
    }
    for row in hp.values():
        assert row["predicted_ms"] == pytest.approx(sum(row["parts"].values()))
        assert row["ratio"] == row["predicted_ms"] / row["step_ms"]
    # 8 exchanges of T · D · 2 bytes · 3/4, one after the other
    n_bytes = 8 * FULL.tokens * FULL.d_model * 2 * 3 / 4
    exposed = {mbit: row["parts"]["Head Parallel, exposed"] for mbit, row in hp.items()}
    assert exposed[100.0] == pytest.approx(8 + 1000 * n_bytes / 12.5e6)
    assert exposed[0.0] == pytest.approx(8 + 1000 * n_bytes / 1e9)
    table = prediction_table(predictions).splitlines()
    assert len(table) == 1 + len(CASES) and table[0].split()[-3:] == ["limit", "100", "Mbit/s"]
    assert {alone_name(c) for c in CASES} == {"moe", "multi_head_latent"}


def rows():
    """k = 4 and 8 without and with a limit; EP sends k times as much and takes 2 and 3 times as
    long, HP once."""
    sweep = []
    for k, slower in ((4, 2.0), (8, 3.0)):
        factors = (("EP", k), ("EP dedup", k - 1), ("EP dedup, 2 chunks", k - 1))
        for name, factor in (*factors, ("HP", 1), ("HP, 2 chunks", 1)):
            c, heads = named(name, k), name.startswith("HP")
            axis = "hp_scatter" if heads else "ep_dispatch"
            n = 1000 * factor
            seconds = {True: 0.5, False: 0.5 * slower}[heads]
            seconds *= {"EP dedup, 2 chunks": 1.25, "HP, 2 chunks": 1.1}.get(name, 1.0)

            def one(seconds, n=n, axis=axis):
                return Sample(
                    [answer(seconds, n + 50, n + 50, **{axis: n, "world_gradients": 50})] * 4
                )

            first = sweep_row(c, 0.0, [one(0.3)], FULL, 2, None)
            sweep += [first, sweep_row(c, 100.0, [one(seconds)], FULL, 2, first)]
    for n in (1, 2, 4):
        for name, seconds in (("HP", 0.2), ("EP dedup", 0.2 * n)):
            sweep.append(scaling_row(case(name, 4), 100.0, n, [Sample([answer(seconds, 1, 1)])]))
    return with_efficiency(sweep)


def test_targets_compare_bytes_times_and_scaling():
    by_name = {t["name"]: t for t in targets(with_predictions([*BESIDE, *rows()], CASES, FULL))}
    assert by_name["HP: bytes on the wire vary over k by"]["value"] == 0.0
    per_k = [t["value"] for name, t in by_name.items() if "per k" in name]
    assert per_k == [1.0, 1.0]
    assert by_name["k = 4: step time of the best EP over HP, network-bound"]["value"] == (
        pytest.approx(2.0)
    )
    assert by_name["k = 8: step time of the best EP over HP, network-bound"]["value"] == (
        pytest.approx(3.0)
    )
    assert by_name["k = 8: step time of the best EP over HP, compute-bound"]["value"] == 1.0
    assert by_name["weak scaling to 4 hosts: efficiency of HP over EP with dedup"]["value"] == 4.0
    chunks = {n.split(",")[1]: t for n, t in by_name.items() if n.startswith("mesh.chunks=0")}
    assert chunks[" EP dedup: time of 2 over that of 1"]["value"] == pytest.approx(1.25)
    assert chunks[" HP: time of 1 over that of 2"]["value"] == pytest.approx(1 / 1.1)
    largest = by_name["headway plan: largest error of a step"]["value"]
    swept = [r for r in with_predictions([*BESIDE, *rows()], CASES, FULL) if "ratio" in r]
    assert largest == max(abs(r["predicted_ms"] / r["step_ms"] - 1) for r in swept)


def test_the_picture_has_a_line_per_rival():
    picture = cluster_plot.svg(rows())
    assert picture.count("<polyline") == 3 * 6 and ">HP×EP</text>" in picture
    assert cluster_plot.ticks(90, 2100) == [100, 200, 500, 1000, 2000]


def test_a_bucket_holds_five_milliseconds_and_the_largest_packets():
    assert hosts.bucket(1000)[3] == "625000" and hosts.bucket(20)[3] == str(128 << 10)


def test_without_namespaces_there_is_one_line_and_exit_code_2(tmp_path):
    """As where iproute2 is missing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "cluster.py"), "--quick"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.strip()
        == "cluster.py: ip is missing; install iproute2 (apt-get install iproute2)"
    )


SAVED = json.loads((ROOT / "docs" / "numbers" / "cluster.json").read_text())


def test_saved_predictions_are_those_of_the_plan():
    """After a change of the plan: python bench/cluster.py --predict."""
    steps = [r for r in SAVED["rows"] if r["bench"] == "sweep" and r["k"] == 8 and r["mbit"] < 300]
    others = [r for r in SAVED["rows"] if r["bench"] != "sweep"]
    again = cluster.predict_again({**SAVED, "rows": others + steps})["rows"][len(others) :]
    assert len(steps) == 8 * 3
    for new, old in zip(again, steps, strict=True):
        assert new["parts"] == pytest.approx(old["parts"]), (new["name"], new["mbit"])
        assert new["predicted_ms"] == pytest.approx(old["predicted_ms"])


def test_the_document_says_how_far_predictions_are_off():
    text = " ".join((ROOT / "docs" / "cluster.md").read_text("utf-8").split())
    ratios = [(r["ratio"], r["mbit"]) for r in SAVED["rows"] if "ratio" in r]
    off = [(ratio, mbit) for ratio, mbit in ratios if abs(ratio - 1) > 0.2]
    ((limited, _),) = [pair for pair in off if pair[1]]
    assert f"Of the {len(ratios)} steps" in text
    assert f"{len(ratios) - len(off)} are within 20% of the median" in text
    assert f"all but one ({limited:.2f})" in text and f"({min(ratios)[0]:.2f} at worst)" in text


def names():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(hosts.PREFIX)}


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "namespaces")
def test_a_tiny_run_on_four_hosts(capsys, monkeypatch):
    options = "--small --repetitions 1 --rates 200 --ks 8 --json".split()
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    cluster.main()
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    swept = [r for r in printed["rows"] if r["bench"] == "sweep"]
    assert len(swept) == 8 * 2
    assert len([r for r in printed["rows"] if r["bench"] == "alone"]) == 3 * 2
    assert all(r["predicted_ms"] > 0 and r["imbalance"] >= 1 for r in swept)
    for row in swept:
        # the interface counts headers, barriers and acknowledgements too
        assert row["ledger_bytes"] < row["wire_bytes"] < 1.5 * row["ledger_bytes"] + 50_000
        assert row["exchange_bytes"] == pytest.approx(row["exchange_formula"], rel=0.15)
    once = Case("HP", 1, MeshConfig(hp=4), model_of("multi_head_latent", 1, cluster.SMALL, 2))
    width = BYTES[swept[0]["dtype"]]
    for row in swept:  # at k = 8 the bytes of k = 1, in one piece or two
        if row["name"] in ("HP", "HP, 2 chunks"):
            assert row["exchange_bytes"] == exchange_formula(once, cluster.SMALL, width)
    assert not any(f"-{os.getpid()}-" in name for name in names())


def running(number):
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "namespaces")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_ended(how):
    """SIGTERM cleans up; after SIGKILL the next run does."""
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "bench" / "cluster.py"), "--small"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    mine = f"-{run.pid}-"
    for _ in range(300):
        if sum(mine in name for name in names()) == cluster.HOSTS:
            break
        time.sleep(0.1)
    time.sleep(0.5)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert children
    run.send_signal(how)
    code = run.wait(30)
    if how == signal.SIGTERM:
        assert code == 130
    else:
        left = [name for name in hosts.remove_leftovers() if mine in name]
        assert len(left) == cluster.HOSTS
    for _ in range(200):
        if not any(running(child) for child in children):
            break
        time.sleep(0.1)
    assert not any(running(child) for child in children)
    assert not any(mine in name for name in names())
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    assert f"hwb{run.pid}" not in links and f"hwv{run.pid}" not in links


def test_sizes_are_what_the_documentation_says():
    assert dataclasses.asdict(FULL) | {"tokens": FULL.tokens} == {
        "d_model": 192,
        "n_layers": 2,
        "active": 512,
        "total": 8,
        "n_heads": 4,
        "d_head": 32,
        "seq_len": 256,
        "batch": 8,
        "collectives": (4096, 262144, 1048576, 4194304),
        "tokens": 2048,
    }
