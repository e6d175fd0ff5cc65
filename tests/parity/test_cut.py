"""A step does not depend on how it is cut: every balance rule, with and without a capacity, in
micro-batches of every size, in chunks, on every mesh, against one process that takes the batch
whole. Loss, every gradient, norm, and what is left after two steps (parameters, biases), in float64,
to 1e-12."""

from dataclasses import replace
from functools import partial

import pytest

from headway.config import BalanceConfig, MeshConfig, OptimConfig, RouterConfig
from tests.parity.test_parity import AUX, ROWS, TOKEN, Case, compare, flat, heads, train

STEPS = 2
"""In the first the load is even and the biases are 0."""
OPTIM = OptimConfig(lr=3e-2, eps=1e-2, clip=0.5)
"""Steps in proportion to small gradients: with a tiny epsilon Adam turns their rounding into 1e-12."""
SEQUENCE = BalanceConfig(aux=0.05, z=1e-3, aux_scope="sequence")
SIGN = BalanceConfig(aux=0.0, z=1e-3, bias="sign", bias_rate=0.1)
QUANTILE = BalanceConfig(aux=0.0, bias="quantile")
RULES = {
    "global batch": (AUX, 0.0),
    "global batch, capacity": (AUX, 1.0),
    "sequence": (SEQUENCE, 0.0),
    "sequence, capacity": (SEQUENCE, 1.0),
    "sign": (SIGN, 0.0),
    "sign, capacity": (SIGN, 1.0),
    "quantile": (QUANTILE, 0.0),
    "quantile and global batch, capacity": (replace(AUX, bias="quantile"), 1.0),
}
KINDS = {
    "sub-token": (heads, RouterConfig()),
    "token": (heads, TOKEN),
    "flat": (flat, RouterConfig(gate="sigmoid", renormalize=True)),
    "experts that do nothing": (partial(heads, n_zero_experts=3), RouterConfig()),
}


def cases(kind: str, mesh: MeshConfig) -> dict[str, Case]:
    """One for each rule."""
    model, router = KINDS[kind]
    return {
        name: Case(model(balance=balance, capacity_factor=factor, router=router), mesh, OPTIM)
        for name, (balance, factor) in RULES.items()
    }


def several(mesh, kind, config, micro):
    """`train` for each rule, by name: the ranks meet once for all of them."""
    return {name: train(mesh, c, micro, STEPS) for name, c in cases(kind, config).items()}


def check(ranks, kind: str, mesh: MeshConfig, micro: int) -> None:
    """All ranks of a mesh against one process."""
    whole = ranks.remember(MeshConfig(), several, kind, MeshConfig(), ROWS)[0]
    for answer in ranks.run(mesh, several, kind, mesh, micro):
        for name, one in whole.items():
            try:
                compare(answer[name], one)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def test_the_rules_differ_and_drop(ranks):
    """What the other tests compare is not the same number again and again."""
    whole = ranks.remember(MeshConfig(), several, "sub-token", MeshConfig(), ROWS)[0]
    name = "layers.1.ffn.router.w_HEL"
    last = {rule: steps[-1]["grads"][name] for rule, (steps, _) in whole.items()}
    for i, a in enumerate(last):
        for b in list(last)[:i]:
            assert float((last[a] - last[b]).norm() / last[b].norm()) > 1e-4, (a, b)
    for rule, (steps, _) in whole.items():
        assert (steps[-1]["dropped"].min() > 0.05) == ("capacity" in rule), rule


@pytest.mark.parametrize(
    ("kind", "micro"), [("sub-token", 8), ("sub-token", 1), ("token", 2), ("flat", 1)]
)
def test_micro_batches(ranks, kind, micro):
    check(ranks, kind, MeshConfig(), micro)


def name(value):
    if not isinstance(value, MeshConfig):
        return str(value)
    return f"dp{value.dp}-hp{value.hp}-ep{value.ep}-{value.shard}"


@pytest.mark.parametrize(
    ("kind", "mesh", "micro"),
    [
        ("sub-token", MeshConfig(dp=2), 4),
        ("sub-token", MeshConfig(hp=2, ep=2, chunks=2), 1),
        ("sub-token", MeshConfig(2, 2, 2), 1),
        ("experts that do nothing", MeshConfig(hp=2, ep=2, chunks=2), 1),
        ("token", MeshConfig(hp=4, chunks=2), 4),
        ("token", MeshConfig(dp=2, hp=2, shard="fsdp"), 2),
        ("flat", MeshConfig(ep=4, ep_scheme="all_gather", chunks=4), 2),
        ("flat", MeshConfig(dp=2, ep=2, ep_scheme="all_to_all", dedup=False), 1),
    ],
    ids=name,
)
def test_meshes(ranks, kind, mesh, micro):
    check(ranks, kind, mesh, micro)
