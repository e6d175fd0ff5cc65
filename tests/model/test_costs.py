"""What modules declare that they cost: a module of one's own is planned, one that says nothing is an
error. The numbers are compared with the running model in tests/plan/test_cost.py and test_memory.py."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from headway.config import Config, DataConfig, ModelConfig, MoEConfig, UsageError
from headway.model.build import build_block
from headway.model.context import Context
from headway.model.costs import Cost, CostGroup, Term, Workload, by_group, costs_of, flops
from headway.model.linear import Linear
from headway.model.transformer import Transformer
from headway.plan.choose import rank_meshes
from headway.plan.describe import describe
from headway.plan.machine import MACHINES
from headway.plan.setting import Setting
from headway.train.resolve import Sizes

D, S, V = 32, 16, 64
CONFIG = Config(
    model=ModelConfig(
        vocab_size=V,
        n_layers=2,
        d_model=D,
        n_heads=4,
        moe=MoEConfig(n_heads=4, n_experts=8, top_k=2, d_expert=8),
    ),
    data=DataConfig(seq_len=S, batch_size=8),
)


class Undeclared(nn.Module):
    """A mixer that runs and does not say what it costs: position t sees the mean of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Linear(D, D)

    def forward(self, x_BSD: Tensor, ctx: Context) -> Tensor:
        n = torch.arange(1, x_BSD.shape[1] + 1, device=x_BSD.device)
        return self.mix(x_BSD.cumsum(1) / n.unsqueeze(-1))

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device):
        return None


class CumulativeMean(Undeclared):
    """The same, with its costs."""

    n_declared = D * D

    def costs(self, work: Workload) -> Sequence[Cost]:
        n = self.n_declared
        saved = Term(2 * work.n_tokens * D * work.bytes_per_value, "2·T·D·b")
        return (
            Cost(CostGroup.MIXER, Term(n, "D·D"), saved=saved),
            Cost(CostGroup.PROJECTIONS, flops=Term(2 * n, "2·D·D")),
        )


class Miscounted(CumulativeMean):
    n_declared = D * D + 1


def blocks(mixer: type[Undeclared]):
    return lambda config, layer, compute: build_block(config, layer, compute, mixer=mixer())


def test_a_mixer_of_ones_own_is_planned_described_and_counted():
    model = Transformer(CONFIG.model, blocks=blocks(CumulativeMean), seed=0)
    tokens = torch.zeros(2, S, dtype=torch.int64)
    assert model(tokens, tokens).nats.requires_grad
    n = sum(p.numel() for p in model.parameters())
    sizes = Sizes.of(model, S)
    idle = 2 * 4 * 8 * 3 * 8 * 8 * 6 // 8  # layers, heads, experts, matrices, F, L; 2 of 8 are used
    assert (sizes.total, sizes.active) == (n, n - idle)
    described = describe(CONFIG, blocks=blocks(CumulativeMean))
    assert described["parameters"] == n
    items = described["items"]["flops_per_token_forward"]
    assert items["attention projections"] == {"value": 2 * 2 * D * D, "formula": "layers·2·D·D"}
    assert "attention scores" not in items
    setting = Setting(CONFIG, MACHINES["cpu"], blocks=blocks(CumulativeMean))
    usual = replace(setting, blocks=build_block)
    (row,), (other,) = (rank_meshes(s, 1)["meshes"] for s in (setting, usual))
    assert row["flops"]["attention scores"] == 0 < other["flops"]["attention scores"]
    assert row["memory_bytes"] < other["memory_bytes"]
    assert len(rank_meshes(setting, 4)["meshes"]) == len(rank_meshes(usual, 4)["meshes"])


def test_a_module_without_costs_is_an_error_that_names_it():
    for call in (
        lambda: Sizes.of(Transformer(CONFIG.model, blocks=blocks(Undeclared)), S),
        lambda: describe(CONFIG, blocks=blocks(Undeclared)),
        lambda: rank_meshes(Setting(CONFIG, MACHINES["cpu"], blocks=blocks(Undeclared)), 2),
    ):
        with pytest.raises(UsageError, match=r"Undeclared does not say what it costs; .* costs\("):
            call()


def test_costs_name_every_parameter():
    with pytest.raises(UsageError, match=r"Miscounted names 1,025 parameters and it has 1,024"):
        costs_of(Miscounted(), Workload(S))


def test_a_formula_that_layers_share_is_written_once():
    costs = [
        Cost(CostGroup.DENSE, flops=Term(6, "2·n")),
        Cost(CostGroup.MIXER, flops=Term(1, "m")),
        Cost(CostGroup.DENSE, flops=Term(6, "2·n")),
        Cost(CostGroup.DENSE, flops=Term(5, "n")),
        Cost(CostGroup.ROUTERS),
    ]
    groups = by_group(costs, flops)
    assert list(groups) == [CostGroup.MIXER, CostGroup.DENSE]
    assert groups[CostGroup.DENSE] == Term(17, "layers·2·n + n")
