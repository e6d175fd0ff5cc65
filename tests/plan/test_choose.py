"""`headway plan` as a whole: what is listed, in which order, and that the numbers add up."""

from dataclasses import replace

import pytest

from headway.config import Config, DataConfig, MoEConfig, RouterConfig, UsageError
from headway.plan.choose import rank_meshes
from headway.plan.cost import model_costs, total
from headway.plan.describe import with_vocab
from headway.plan.layout import MeshLayout, illegal, meshes
from headway.plan.machine import MACHINES
from headway.plan.memory import states
from headway.plan.setting import Setting
from headway.plan.table import format_plan
from headway.recipes import load
from tests.plan.test_memory import MODELS

H100 = MACHINES["h100"]
LARGE = with_vocab(load("large"))
SMALL = Config(recipe="one", model=MODELS["multi-head latent"], data=DataConfig(batch_size=16))


@pytest.fixture(scope="module")
def large():
    return rank_meshes(Setting(LARGE, H100), 64)


def test_every_legal_mesh_is_listed(large):
    legal = {str(m) for m in meshes(64) if not illegal(LARGE.model, m)}
    assert {row["mesh"] for row in large["meshes"]} == legal
    assert len(large["illegal"]) == len(list(meshes(64))) - len(legal) > 0
    for row in large["meshes"]:
        assert row["dp"] * row["hp"] * row["ep"] == 64
    ways = [(r["mesh"], r["scheme"], r["replicas"]) for r in large["meshes"]]
    assert len(ways) == len(set(ways)) == sum(2 if m.endswith(",ep=1") else 4 for m in legal)
    both = {r["scheme"] for r in large["meshes"] if r["ep"] == 2}
    assert len(both) == 2 and "all_gather" in both
    beyond = [r for r in large["illegal"] if r["hp"] == 16]
    assert all(r["reason"].startswith("hp=16 does not divide n_heads=8") for r in beyond)


def test_fastest_first_and_too_large_last(large):
    rows = large["meshes"]
    keys = [(not r["fits"], r["step_seconds"]) for r in rows]
    assert keys == sorted(keys) and large["best"] == rows[0]
    assert {r["fits"] for r in rows} == {True, False}
    for row in rows:
        assert row["fits"] == (row["memory_bytes"] <= 80e9) == (row["reason"] == "")
        if not row["fits"]:
            assert f"{row['memory_bytes']:,} bytes" in row["reason"]
            assert "80,000,000,000" in row["reason"]
    assert large["best_replicated"]["replicas"] == "replicate"


def test_sums_and_formulas(large):
    for row in large["meshes"]:
        assert row["step_seconds"] == pytest.approx(sum(row["seconds"].values()))
        assert row["memory_bytes"] == pytest.approx(sum(row["memory"].values()), abs=20)
        assert row["bytes_sent_total"] == pytest.approx(sum(row["bytes_sent"].values()), abs=20)
        assert row["flops_total"] == sum(row["flops"].values())
        assert row["tokens_per_second"] == pytest.approx(256 * 4096 / row["step_seconds"])
        for group in ("seconds", "memory", "bytes_sent", "flops"):
            assert set(row[group]) <= set(large["formulas"][group])
        for name in ("parameters", "parameters_held", "mfu", "memory_bytes", "step_seconds"):
            assert large["formulas"][name]


def test_chunks_are_chosen_and_said():
    """Nodes of two: an ep axis of four spans them, one of two does not."""
    rows = rank_meshes(Setting(SMALL, H100, 2), 4)["meshes"]
    chosen = {(r["ep"], r["scheme"], r["replicas"], r["dp"]): r["chunks"] for r in rows}
    assert {key for key, chunks in chosen.items() if chunks != 1} == {
        (4, scheme, replicas, 1)
        for _, scheme, replicas, _ in chosen
        if scheme not in (None, "all_gather")
    }
    assert any("spans nodes" in r["chunks_because"] for r in rows)
    given = rank_meshes(Setting(SMALL, H100, 2, chunks=3), 4)
    assert {r["chunks"] for r in given["meshes"]} == {3} and given["chunks"] == 3
    assert "chunks: 3, --chunks 3" in format_plan(given)


def test_one_rank_is_describe():
    ranking = rank_meshes(Setting(SMALL, H100, bytes_per_value=4), 1)
    (row,) = ranking["meshes"]
    costs = model_costs(SMALL, 16, 4)
    states_ = states(costs, MeshLayout(), SMALL.optim)
    assert row["memory_bytes"] == total(states_) + total(costs.saved)
    assert row["bytes_sent"] == {} and row["parameters"] == row["parameters_held"]
    assert (ranking["micro_batch_size"], ranking["passes"]) == (16, 1)


def test_schemes_can_be_asked_for():
    setting = Setting(SMALL, H100)
    for scheme in ("all_to_all", "all_to_all_per_slot", "all_gather"):
        rows = rank_meshes(setting, 2, scheme)["meshes"]
        assert {r["scheme"] for r in rows} == {None, scheme}
    auto = [r for r in rank_meshes(setting, 2)["meshes"] if r["ep"] == 2]
    fewest = [r for r in auto if r["fewest_bytes"]]
    sizes = fewest[0]["ep_bytes_by_scheme"]
    assert sizes[fewest[0]["scheme"]] == min(sizes.values())


def test_nothing_fits():
    ranking = rank_meshes(Setting(SMALL, replace(H100, memory=1e4)), 2)
    assert ranking["best"] is None and not any(r["fits"] for r in ranking["meshes"])
    assert "no mesh fits; the smallest" in format_plan(ranking)


def test_ranks_and_batch():
    with pytest.raises(UsageError, match="--gpus 0 is below 1"):
        rank_meshes(Setting(SMALL, H100), 0)
    with pytest.raises(UsageError, match="batch_size=16 does not divide among --gpus 3"):
        rank_meshes(Setting(SMALL, H100), 3)


def test_dense_and_flat_models():
    for model, listed in (("dense", {"dp=4,hp=1,ep=1"}), ("flat", {4, 2, 1})):
        config = replace(SMALL, model=MODELS[model])
        ranking = rank_meshes(Setting(config, H100), 4)
        names = {r["mesh"] for r in ranking["meshes"]}
        assert len(names) == len(listed) and all("hp=1" in name for name in names)
        assert "fastest" in format_plan(ranking)


def test_more_heads_than_ranks_send_the_same_for_any_k():
    """The promise: with Head Parallel alone, tokens on the wire do not grow with top_k."""
    sent = []
    for k in (1, 2, 6):
        router = RouterConfig(gate="sigmoid")  # the default gate needs k of 2 or more
        moe: MoEConfig = replace(SMALL.model.moe, top_k=k, router=router)
        config = replace(SMALL, model=replace(SMALL.model, moe=moe))
        rows = rank_meshes(Setting(config, H100), 2)["meshes"]
        (row,) = [r for r in rows if r["hp"] == 2 and r["replicas"] == "replicate"]
        sent.append(row["bytes_sent"]["Head Parallel"])
    assert len(set(sent)) == 1
