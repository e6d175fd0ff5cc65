"""Objectives of other trainers, defined here, through `step.gradient`: accumulated over micro-batches they equal plain
autograd over the whole batch, in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from headway.config import BalanceConfig, ModelConfig, MoEConfig
from headway.data.batch import Batch, micro_batches
from headway.model.balance import balance_loss
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.train.objective import MicroLoss, StepContext
from headway.train.step import gradient
from tests.compare import assert_close

BALANCE = BalanceConfig(aux=0.05, z=1e-3)
LOAD = [torch.tensor([[9.0, 1, 1, 1], [0, 2, 4, 6]], dtype=torch.float64)] * 2
V = 32


def build(seed: int) -> Transformer:
    moe = MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=8, balance=BALANCE)
    config = ModelConfig(vocab_size=V, n_layers=2, d_model=16, n_heads=2, moe=moe)
    return Transformer(config, Compute(torch.float64), seed=seed).double()


@dataclass(frozen=True, kw_only=True)
class WeightedBatch(Batch):
    weights_BS: Tensor


class TokenWeighted:
    """Σ w·(−log p) / Σ w, as supervised fine-tuning on prompts and answers has it."""

    def weight(self, batch: WeightedBatch) -> Tensor:
        return batch.weights_BS.sum()

    def losses(self, logits_BSV: Tensor, batch: WeightedBatch) -> Tensor:
        log_p = logits_BSV.log_softmax(-1).gather(-1, batch.targets_BS[..., None]).squeeze(-1)
        return -batch.weights_BS * log_p

    def __call__(self, model: Transformer, batch: WeightedBatch, step: StepContext) -> MicroLoss:
        out = model(batch.tokens_BS)
        loss_sum = self.losses(out.logits_BSV, batch).sum()
        aux = balance_loss(out.stats, BALANCE, step.load)
        total = loss_sum / step.weight + aux / step.n_micro_batches
        squared = batch.weights_BS.detach().square().sum()
        return MicroLoss(total, loss_sum, aux, out.stats, {"squared weights": squared})


class Distillation(TokenWeighted):
    """KL(teacher ‖ student) of every token, weighted; the frozen teacher is the objective's."""

    def __init__(self):
        self.teacher = build(seed=1).requires_grad_(False)

    def losses(self, logits_BSV: Tensor, batch: WeightedBatch) -> Tensor:
        teacher = self.teacher(batch.tokens_BS).logits_BSV.log_softmax(-1)
        student = logits_BSV.log_softmax(-1)
        return batch.weights_BS * (teacher.exp() * (teacher - student)).sum(-1)


class PolicyGradient(TokenWeighted):
    """Advantages, of either sign, times −log p, over the number of tokens."""

    def weight(self, batch: WeightedBatch) -> Tensor:
        return torch.tensor(batch.tokens_BS.numel())

    def losses(self, logits_BSV: Tensor, batch: WeightedBatch) -> Tensor:
        return super().losses(logits_BSV, batch) - 0.5 * logits_BSV.logsumexp(-1)


@pytest.mark.parametrize("objective", [TokenWeighted, Distillation, PolicyGradient])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_an_objective_of_ones_own_has_the_gradient_of_plain_autograd(objective, size):
    ours = objective()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(V, (2, 6, 8), generator=generator)
    weights = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    weights = weights - 0.4 if objective is PolicyGradient else weights * (weights > 0.3)
    batch = WeightedBatch(tokens_BS=tokens, targets_BS=targets, doc_BS=None, weights_BS=weights)

    plain = build(seed=0)
    out = plain(tokens)
    loss_sum = ours.losses(out.logits_BSV, batch).sum()
    weight = tokens.numel() if objective is PolicyGradient else weights.sum()
    aux = balance_loss(out.stats, BALANCE, LOAD)
    want = torch.autograd.grad(loss_sum / weight + aux, [*plain.parameters()])

    model = build(seed=0)
    result = gradient(model, micro_batches(batch, size, torch.device("cpu")), ours, load=LOAD)
    for (name, p), g in zip(model.named_parameters(), want, strict=True):
        assert p.grad is not None and g.norm() > 0, name
        assert_close(p.grad, g, 1e-12)
    assert result.loss == pytest.approx(float(loss_sum.detach() / weight), rel=1e-12)
    assert result.balance == pytest.approx(float(aux.detach()), rel=1e-12)
    squared = float(weights.square().sum())
    assert result.sums == {"squared weights": pytest.approx(squared, rel=1e-12)}
