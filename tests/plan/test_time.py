"""Predicted seconds against hand numbers, on a machine of round numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.plan.cost import Item, ModelCosts, model_costs, total
from headway.plan.layer import exchange_costs
from headway.plan.layout import MeshLayout
from headway.plan.machine import Machine
from headway.plan.memory import memory
from headway.plan.setting import Setting
from headway.plan.time import newton_schulz, step_flops, step_seconds
from headway.plan.volume import comm_volumes
from tests.plan.test_memory import MODELS

MACHINE = Machine(
    "round", 1e9, 1e8, 1e12, 1e8, 1e6, 1e5, 1e-3, 0.5, 0.25, 0.2, 0.1
)  # bytes/s: 1e8 memory, 1e6 inside, 1e5 between nodes
MODEL = ModelConfig(
    vocab_size=64,
    n_layers=2,
    d_model=32,
    n_heads=4,
    moe=MoEConfig(n_heads=4, n_experts=8, top_k=2, d_expert=8),
)
CONFIG = Config(model=MODEL, data=DataConfig(seq_len=16, batch_size=8))
T, PASSES = 64, 2  # of one rank: 4 sequences in 2 passes


def costs_of(config: Config = CONFIG, b: int = 2) -> ModelCosts:
    return model_costs(config, 2, b)


def parts(layout, config=CONFIG, per_node=8, chunks=1, imbalance=1.0, b=2):
    setting = Setting(config, MACHINE, per_node, b, chunks, imbalance)
    uneven = imbalance if layout.ep > 1 else 1.0
    costs = costs_of(config, b)
    held = memory(config, costs, layout, 2, b, uneven)
    wires = comm_volumes(setting, costs, layout, T, PASSES)
    times = step_seconds(setting, costs, layout, T, PASSES, held, wires)
    return {i.name: i.value for i in times}


def test_compute():
    """One rank, D = 32 < 1024: narrow matmuls at a quarter of 1e9 FLOP/s, experts at a fifth."""
    forward = {i.name: i.value for i in costs_of().flops}
    times = parts(MeshLayout())
    experts, scores = forward.pop("experts"), forward.pop("attention scores")
    assert experts == 2 * 2 * 2 * 3 * 8 * 32
    assert times["experts"] == pytest.approx(3 * T * experts / 2e8)
    assert times["attention scores"] == pytest.approx(3 * T * scores / 1e8)
    assert times["matmuls"] == pytest.approx(3 * T * sum(forward.values()) / 2.5e8)
    slow = parts(MeshLayout(), b=4)
    assert slow["experts"] == pytest.approx(10 * times["experts"])  # float32's own peak
    wide = Config(model=replace(MODEL, d_model=1024), data=CONFIG.data)
    assert parts(MeshLayout(), wide)["matmuls"] == pytest.approx(
        step_flops(wide, costs_of(wide), T).matmuls.value / 5e8  # large matmuls reach a half
    )


def test_recompute_does_the_first_matmul_of_experts_again():
    again = replace(CONFIG, run=RunConfig(recompute=True))
    seconds = [step_flops(c, costs_of(c), T).experts.value for c in (again, CONFIG)]
    ratio = seconds[0] / seconds[1]
    assert ratio == pytest.approx(11 / 9)  # 2/9 more with SwiGLU, as kernels/experts.py says


def test_imbalance_slows_experts_of_an_ep_axis_alone():
    ep, hp = MeshLayout(ep=2, scheme="all_gather"), MeshLayout(hp=2)
    assert parts(ep, imbalance=1.5)["experts"] == pytest.approx(1.5 * parts(ep)["experts"])
    assert parts(hp, imbalance=1.5) == parts(hp)


def test_exchange_and_its_overlap(monkeypatch):
    """2 layers · 64 tokens · 32 values · 2 bytes · ½ · 4 ways over 1e6 bytes/s, and 16 messages."""
    name = "Head Parallel, exposed"
    comm = 4 * 2 * 64 * 32 * 2 / 2 / 1e6 + 1e-3 * 4 * 2 * PASSES
    assert parts(MeshLayout(hp=2))[name] == pytest.approx(comm)
    between = 4 * 2 * 64 * 32 * 2 / 2 / 1e5 + 1e-3 * 4 * 2 * PASSES
    assert parts(MeshLayout(hp=2), per_node=1)[name] == pytest.approx(between)
    # in 4 chunks: 4 times the messages, of which some work of the sparse layers hides some
    more = comm + 3 * 1e-3 * 4 * 2 * PASSES
    assert 0.5 * more < parts(MeshLayout(hp=2), chunks=4)[name] < 0.97 * more
    monkeypatch.setattr(Machine, "rate", lambda *_: 1e30)
    monkeypatch.setattr(f"{__name__}.MACHINE", replace(MACHINE, memory_bandwidth=1e30))
    assert parts(MeshLayout(hp=2), chunks=4)[name] == pytest.approx(more)


def test_small_sums():
    """Targets, norm and statistics, whatever the passes: 2·(4−1) messages each."""
    assert parts(MeshLayout(dp=2, hp=2))["small sums"] == pytest.approx(3 * 6e-3)
    assert "small sums" not in parts(MeshLayout())


def test_gradients_hide_behind_the_last_backward_pass():
    """hp = 2 in nodes of 2, dp = 2 between them: experts and routers over dp, the rest over all.
    They also leave while sub-tokens are on their way within a node, on another network."""
    layout = MeshLayout(dp=2, hp=2)
    setting = Setting(CONFIG, MACHINE, chunks=1)
    wires = {w.name: w for w in comm_volumes(setting, costs_of(), layout, T, PASSES)}
    comm = sum(w.bytes / 1e5 + 1e-3 * w.messages for w in wires.values() if "gradients" in w.name)
    assert len(wires) == 4
    times = parts(layout, per_node=2)
    compute = ("matmuls", "attention scores", "experts", "memory traffic", "Head Parallel, exposed")
    hides = 2 / 3 / PASSES * sum(times[name] for name in compute)
    assert hides > 0.01 * comm
    pieces = MODEL.n_layers + 1
    assert times["gradients summed"] == pytest.approx(max(comm / pieces, comm - hides))


@pytest.mark.parametrize("bandwidth", [1e4, 1e5, 1e6, 1e7, 1e9])
def test_with_fsdp_each_second_of_compute_hides_once(bandwidth, monkeypatch):
    """Forward hides half of the weights' time, backward the other half and then gradients, which
    leave in every pass with half of the ring; on a slow network the sum is what is sent."""
    machine = replace(MACHINE, intra_node=bandwidth, inter_node=bandwidth)
    monkeypatch.setattr(f"{__name__}.MACHINE", machine)
    layout = MeshLayout(dp=2, hp=2, shard=True)
    times = parts(layout)
    wires = comm_volumes(Setting(CONFIG, machine, chunks=1), costs_of(), layout, T, PASSES)
    weights, gradients = (
        sum(w.bytes / bandwidth + 1e-3 * w.messages for w in wires if w.kind == kind)
        for kind in ("weights", "gradients")
    )
    compute = sum(times[n] for n in ("matmuls", "attention scores", "experts", "memory traffic"))
    late = [max(weights / 2 - share * compute, 0) for share in (1 / 3, 2 / 3)]
    free = max(2 / 3 * compute - weights / 2, 0)
    n_layers = MODEL.n_layers
    exposed = max(weights / (2 * n_layers * PASSES), sum(late))
    assert times["weights gathered, exposed"] == pytest.approx(exposed)
    summed = max(gradients / (n_layers + 1), gradients - free)
    assert times["gradients summed"] == pytest.approx(summed)
    if all(late):
        assert exposed + summed + compute == pytest.approx(weights + gradients)


def test_tokens_on_the_same_network_leave_less_time_for_weights():
    """hp = 2 in a node of four: in four chunks computation hides sub-tokens too, and a second that
    it hides of them hides nothing of the weights."""
    layout = MeshLayout(dp=2, hp=2, shard=True)
    setting, once = Setting(CONFIG, MACHINE, 4, 2, 4), T // PASSES
    hidden = (
        exchange_costs(setting, costs_of(), layout, once).hidden["hp"] * MODEL.n_layers * PASSES
    )
    times = parts(layout, per_node=4, chunks=4)
    wires = comm_volumes(setting, costs_of(), layout, T, PASSES)
    weights = sum(w.bytes / 1e6 + 1e-3 * w.messages for w in wires if w.kind == "weights")
    work = "matmuls, attention scores, experts, memory traffic, experts again".split(", ")
    free = sum(times[name] for name in work) - hidden
    late = [max(weights / 2 - share * free, 0) for share in (1 / 3, 2 / 3)]
    assert hidden > 0.01 * weights and any(late)
    assert times["weights gathered, exposed"] == pytest.approx(sum(late))


RATES = "peak memory_bandwidth intra_node inter_node experts_efficiency rows_efficiency".split()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_faster_machine_never_takes_longer(data):
    """Whatever is faster: time that is saved hides less, but never more than it was."""
    dp, hp, ep = data.draw(st.sampled_from([(2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (2, 2, 2)]))
    scheme = data.draw(st.sampled_from(["all_to_all", "all_gather"])) if ep > 1 else None
    layout = MeshLayout(dp, hp, ep, scheme, data.draw(st.booleans()))
    scale = st.floats(0.01, 100)
    machine = replace(MACHINE, **{n: getattr(MACHINE, n) * data.draw(scale) for n in RATES[:4]})
    faster = data.draw(st.sampled_from(RATES))
    quick = replace(machine, **{faster: getattr(machine, faster) * data.draw(st.floats(1, 3))})
    chunks, per_node = data.draw(st.sampled_from([1, 4])), data.draw(st.sampled_from([1, 2, 8]))
    seconds = []
    for one in (machine, quick):
        setting = Setting(CONFIG, one, per_node, 2, chunks)
        held = memory(CONFIG, costs_of(), layout, 2, 2)
        volumes = comm_volumes(setting, costs_of(), layout, T, PASSES)
        items = step_seconds(setting, costs_of(), layout, T, PASSES, held, volumes)
        seconds.append(total(items))
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


def test_every_further_chunk_reads_the_experts_again():
    """4 heads on 4 ranks: 2 layers · 8 experts · 3·8·8 parameters, read three times in two bytes,
    and 12 bytes to add their gradient."""
    assert "experts again" not in parts(MeshLayout(hp=4), chunks=1)
    times = parts(MeshLayout(hp=4), chunks=3)["experts again"]
    assert times == pytest.approx(PASSES * 2 * (3 * 2 + 12) * 2 * 8 * 3 * 8 * 8 / 1e8)


def test_memory_traffic_and_optimiser():
    held = memory(CONFIG, costs_of(), MeshLayout(), 2, 2)
    by_name = {i.name: i.value for i in held}
    n = by_name["weights"] / 4
    times = parts(MeshLayout())
    assert times["optimiser"] == pytest.approx((8 * n + 4 * n + 16 * n) / 1e8)
    saved = total(held) - 16 * n - by_name["weights cast to the matmul's dtype"]
    assert times["memory traffic"] == pytest.approx(PASSES * (2 * saved + 6 * n) / 1e8)
    assert "Newton–Schulz" not in times


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_newton_schulz_of_the_built_model(name, experts):
    """Every matrix that Muon has: five times two m·m·n and one m·m·m matmul."""
    optim = OptimConfig(name="muon", muon_experts=experts)
    muon = build_optimizers(Transformer(MODELS[name], seed=0), optim).muon
    assert muon is not None
    expected = 0
    for p in (p for group in muon.param_groups for p in group["params"]):
        m, n = sorted(p.shape[-2:])
        expected += p.numel() // (m * n) * 5 * (4 * m * m * n + 2 * m**3)
    costs = costs_of(Config(model=MODELS[name]))
    assert newton_schulz(costs, optim, MeshLayout()) == expected
    sharded = newton_schulz(costs, optim, MeshLayout(dp=2, shard=True))
    assert sharded == pytest.approx(expected / 2)


def test_parts_are_items_with_formulas():
    layout = MeshLayout(dp=2, hp=2, ep=2, scheme="all_to_all", shard=True)
    setting = Setting(CONFIG, MACHINE)
    costs = costs_of()
    held = memory(CONFIG, costs, layout, 2, 2)
    wires = comm_volumes(setting, costs, layout, T, PASSES)
    times = step_seconds(setting, costs, layout, T, PASSES, held, wires)
    assert all(isinstance(i, Item) and i.formula and i.value > 0 for i in times)
    assert not torch.is_tensor(times[0].value)
