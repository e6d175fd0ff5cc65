"""`headway plan`."""

import json

from headway import recipes
from headway.cli.options import override
from tests.command import call, mistake


def test_plan_lists_meshes():
    done = call("plan", "large", "--gpus", 64, "--gpu", "h100", "--json")
    table = done.json
    assert done.code == 0 and len(table["meshes"]) > 20 and table["best"]["fits"]
    assert table["dtype"] == "bfloat16" and "ms per step" in done.out
    assert "hp=16 does not divide n_heads=8" in done.out
    assert "assumed, not measured: latency" in done.out and "vendor's: peak" in done.out
    slow = call("plan", "large", "--gpus", 64, "--network", 10, "--json").json
    for row in slow["meshes"]:
        if "between nodes" in row["links"].values():
            twin = next(
                r
                for r in table["meshes"]
                if all(r[key] == row[key] for key in ("mesh", "scheme", "replicas"))
            )
            assert row["step_seconds"] > twin["step_seconds"]


def test_plan_takes_overrides_and_exits_1_when_nothing_fits():
    args = ("plan", "demo", "--gpus", 2, "--gpu", "cpu", "--json")
    table = call(*args).json
    assert table["dtype"] == "float32"
    assert {r["mesh"] for r in table["meshes"]} == {
        "dp=2,hp=1,ep=1",
        "dp=1,hp=2,ep=1",
        "dp=1,hp=1,ep=2",
    }
    wider = call(*args, "--model.moe.d-expert", 128).json
    before, after = (
        next(r["parameters"] for r in answer["meshes"] if r["mesh"] == "dp=1,hp=2,ep=1")
        for answer in (table, wider)
    )
    assert after - before == 4 * 4 * 32 * 3 * 64 * 48 // 2
    big = call("plan", "large", "--gpus", 1, "--gpu", "cpu", "--json")
    assert big.code == 1 and big.json["best"] is None and "no mesh fits" in big.out


def test_plan_counts_eight_bits_on_the_wire():
    args = ("plan", "large", "--gpus", 64, "--json")
    plain, narrow = call(*args), call(*args, "--mesh.payload", "float8")
    assert narrow.code == 0, narrow.err
    mine = [
        next(r for r in done.json["meshes"] if r["mesh"] == "dp=8,hp=8,ep=1")["bytes_sent"]
        for done in (plain, narrow)
    ]
    L = 256
    assert mine[1]["Head Parallel"] / mine[0]["Head Parallel"] == (L + 4) / (2 * L)


def test_the_options_of_plan_make_what_was_predicted():
    """A config with them has the winner's mesh, scheme, chunks and payload."""
    asked = "--scheme all_to_all_per_slot --chunks 2 --mesh.payload float8".split()
    done = call("plan", "moe", "--gpus", 2, "--gpu", "cpu", *asked, "--json")
    best, line = done.json["best"], done.out.split("options: ")[1].splitlines()[0]
    mesh = override(recipes.load("moe"), line.split(), "test").mesh
    assert (mesh.dp, mesh.hp, mesh.ep) == (best["dp"], best["hp"], best["ep"])
    assert (mesh.chunks, mesh.payload) == (2, "float8")
    if best["ep"] > 1:
        assert (mesh.ep_scheme, mesh.dedup) == ("all_to_all", False)


def test_plan_takes_the_batch_of_a_run_on_as_many_ranks():
    """`optim.transfer=power` asks for 30 sequences: 30 in one process, 32 on 8 ranks."""
    words = "demo --optim.transfer power --optim.steps 5000".split()
    done = call("plan", *words, "--gpus", 8, "--gpu", "cpu", "--json")
    assert (done.json["batch_size"], done.json["micro_batch_size"]) == (32, 4)
    one = call("plan", *words, "--gpus", 1, "--gpu", "cpu", "--json")
    assert one.json["batch_size"] == 30


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
