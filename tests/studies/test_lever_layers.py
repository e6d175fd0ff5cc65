"""Levers: fixed maps are undone behind the experts, factors are matrices, the rest is what it says."""

import torch

from headway.config import MoEConfig
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from studies import lever_layers as levers
from studies.arms import heads, slices
from tests.compare import assert_close


def model(kind, projection="learned"):
    make = heads if projection == "learned" else slices
    config = make("python", 2, edit=levers.change(kind)).config.model
    moe = MoEConfig(
        kind="multi_head_latent", n_heads=2, n_experts=4, top_k=2, d_expert=8, projection=projection
    )
    config = type(config)(vocab_size=32, n_layers=2, d_model=32, n_heads=2, moe=moe)
    made = Transformer(config, Compute(torch.float32), seed=1)
    with torch.no_grad():
        levers.change(kind)(made)
    return made


def test_fixed_maps_are_undone():
    x_TD = torch.randn(5, 32)
    for kind in (levers.Permuted, levers.Rotated, levers.RotatedScaled):
        orders = []
        for layer in model(kind, "none").sparse_layers():
            layer.norm = None
            z_THL = layer.split(x_TD)
            assert_close(layer.merge(z_THL), x_TD, 1e-6)
            assert_close(z_THL.norm(), x_TD.norm(), 1e-6)
            assert (z_THL.flatten(1) - x_TD).abs().max() > 0.1
            orders.append(z_THL)
        assert not torch.equal(*orders)  # other ones in each layer


def test_block_diagonal_factors_are_a_matrix():
    factor = levers.BlockDiagonal(32, 1.0, 0, torch.zeros(1))
    matrix_DD = factor(torch.eye(32))
    x_TD = torch.randn(3, 32)
    assert_close(factor(x_TD), x_TD @ matrix_DD, 1e-6)
    assert torch.linalg.matrix_rank(matrix_DD) == 32 and (matrix_DD != 0).all()


def test_learned_projections():
    tied = model(levers.Tied).sparse_layers()[0]
    y_THL = torch.randn(5, 2, 16)
    assert_close(tied.merge(y_THL), y_THL.flatten(1) @ tied.w_in.weight / 2, 1e-6)
    shared = model(levers.Shared)
    first, second = shared.sparse_layers()
    assert_close(second.merge(y_THL), first.merge(y_THL), 0.0)
    names = [name for name, _ in shared.named_parameters() if ".w_in.weight" in name]
    assert len(names) == 1
    start = model(levers.Orthogonal).sparse_layers()[1]
    assert_close(start.w_in.weight @ start.w_in.weight.t(), torch.eye(32), 1e-5)
    assert_close(start.w_out.weight * 2, start.w_in.weight.t(), 1e-6)
    gates = model(levers.HeadGates).sparse_layers()[0]
    x_TD = torch.randn(5, 32)
    gates.split(x_TD)
    expected = gates.w_out((2 * gates.gate(x_TD).sigmoid()[..., None] * y_THL).flatten(1))
    assert_close(gates.merge(y_THL), expected, 1e-6)
