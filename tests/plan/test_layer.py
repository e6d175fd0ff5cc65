"""Seconds of a sparse layer's stages, exchanges and copies, against hand numbers."""

from dataclasses import replace

import pytest

from headway.config import RouterConfig, RunConfig
from headway.model.costs import CostGroup
from headway.plan.layer import exchange_costs, stages
from headway.plan.layout import MeshLayout
from headway.plan.link import Curve
from headway.plan.setting import Setting
from headway.plan.traffic import expected_ranks
from tests.plan.test_time import CONFIG, MACHINE, MODEL, T, costs_of

SPEED = 1e8 * 0.5  # bytes/s of memory, and the share of it that rows reach
MACHINE = replace(MACHINE, rows_efficiency=0.5)


def layer_costs(layout, config=CONFIG, machine=MACHINE, chunks=1, imbalance=1.0, per_node=8):
    setting = Setting(config, machine, per_node, 2, chunks, imbalance)
    return exchange_costs(setting, costs_of(config), layout, T)


def test_stages_add_up_to_the_layer():
    forward = {i.part: i.value * T / 2 for i in costs_of().flops}  # of one of two layers
    layer = stages(Setting(CONFIG, MACHINE), costs_of(), MeshLayout(), T)
    assert layer.experts.forward == pytest.approx(forward[CostGroup.EXPERTS] / 2e8)
    assert layer.experts.backward == pytest.approx(2 * layer.experts.forward)
    projections = layer.split.forward + layer.merge.forward
    assert projections == pytest.approx(forward[CostGroup.LATENT] / 2.5e8)
    assert layer.router.forward == pytest.approx(forward[CostGroup.ROUTERS] / 2.5e8)
    assert layer.shared.forward == 0 and not layer.early_route
    recompute = replace(CONFIG, run=RunConfig(recompute=True))
    again = stages(Setting(recompute, MACHINE), costs_of(), MeshLayout(), T)
    assert again.experts.backward == pytest.approx((2 + 2 / 3) * layer.experts.forward)


def test_copies():
    values = T * 32
    assert layer_costs(MeshLayout(hp=2)).copies == pytest.approx(8 * 2 * values / SPEED)
    token = replace(MODEL, moe=replace(MODEL.moe, router=RouterConfig(reads="token")))
    assert layer_costs(MeshLayout(hp=2), replace(CONFIG, model=token)).copies == pytest.approx(
        16 * 2 * values / SPEED
    )
    rows = values * expected_ranks(2, 2)
    once = layer_costs(MeshLayout(ep=2, scheme="all_to_all")).copies
    assert once == pytest.approx((14 * 2 + 32) * rows / SPEED)
    slots = layer_costs(MeshLayout(ep=2, scheme="all_to_all_per_slot")).copies
    assert slots == pytest.approx((25 * 2 + 44) * 2 * values / SPEED)
    gathered = layer_costs(MeshLayout(ep=2, scheme="all_gather")).copies
    assert gathered == pytest.approx((2 * 2 + (4 * 2 + 8) * 2) * values / SPEED)


def test_the_busiest_link_decides_where_load_is_uneven():
    even, uneven = (
        layer_costs(MeshLayout(ep=2, scheme="all_to_all"), imbalance=x, per_node=1)
        for x in (1.0, 1.5)
    )
    latency = (4 + 1) * 1e-3 + 8 / 1e5  # of four exchanges and the counts
    assert uneven.exposed["ep"] - latency == pytest.approx(1.5 * (even.exposed["ep"] - latency))
    gathered = [layer_costs(MeshLayout(ep=2, scheme="all_gather"), imbalance=x) for x in (1.0, 1.5)]
    assert gathered[0].exposed == gathered[1].exposed


def test_crowded_ranks_share_out_uneven_work():
    layout = MeshLayout(ep=2, scheme="all_to_all")
    machines = [replace(MACHINE, oversubscription=x) for x in (1.0, 1.2, 2.0)]
    settings = [Setting(CONFIG, machine, imbalance=1.5) for machine in machines]
    busy = [stages(s, costs_of(), layout, T).experts.forward for s in settings]
    assert [x / busy[2] for x in busy] == pytest.approx([1.5, 1.25, 1.0])


def test_chunks_of_measured_exchanges_share_the_link():
    """Two at once as fast as half the bytes: chunks then halve what is not hidden."""
    alone = Curve("all_to_all", 2, True, 1, ((0.0, 1e-9), (1e6, 1.0)))
    both = Curve("all_to_all", 2, True, 2, ((0.0, 1e-9), (1e6, 0.5)))
    quick = replace(MACHINE, peak=1e30, memory_bandwidth=1e30, curves=(alone, both))
    layout = MeshLayout(hp=2)
    assert layer_costs(layout, machine=quick, chunks=2).exposed["hp"] == pytest.approx(
        layer_costs(layout, machine=quick).exposed["hp"] / 2, rel=1e-3
    )


def test_links_know_their_place():
    settings = [Setting(CONFIG, MACHINE, per_node) for per_node in (8, 1)]
    inside, between = (setting.link(MeshLayout(hp=2), "hp") for setting in settings)
    assert (inside.rates.bandwidth, between.rates.bandwidth) == (1e6, 1e5)
    assert inside.inside and not between.inside and between.within == inside.rates


def test_what_is_sent_is_exposed_or_hidden():
    """One chunk hides nothing; of more, computation hides what does not wait."""
    alone, chunked = (layer_costs(MeshLayout(hp=2), chunks=n) for n in (1, 4))
    sent = 4 * T * 32 * 2 / 2 / 1e6
    assert alone.exposed["hp"] == pytest.approx(sent + 4e-3) and alone.hidden["hp"] == 0
    assert chunked.hidden["hp"] > 0.02 * sent
    both = chunked.exposed["hp"] + chunked.hidden["hp"]
    assert both == pytest.approx(sent + 4 * 4e-3)
