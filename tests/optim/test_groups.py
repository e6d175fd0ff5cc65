"""Parameter groups, the one gradient norm, state under names."""

import math

import pytest
import torch
from torch import nn

from headway.config import OptimConfig, UsageError
from headway.model.linear import Embedding, Linear, RMSNorm
from headway.model.roles import Group, Role
from headway.optim.groups import build_optimizers, clip_factor
from headway.parallel.reduce import total_norm


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_HEL = nn.Parameter(torch.randn(2, 4, 3))
        self.register_buffer("bias_HE", torch.zeros(2, 4))

    def roles(self):
        return {"w_HEL": Role(Group.ROUTER), "bias_HE": Role(Group.ROUTER)}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in_HEGFL = nn.Parameter(torch.randn(2, 4, 2, 5, 3))
        self.w_out_HEFL = nn.Parameter(torch.randn(2, 4, 5, 3))

    def roles(self):
        return {"w_in_HEGFL": Role(Group.EXPERT_IN), "w_out_HEFL": Role(Group.EXPERT_OUT)}


class Biased(nn.Linear):
    def roles(self):
        return {"weight": Role(Group.MATRIX), "bias": Role(Group.VECTOR)}


class Ffn(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()
        self.experts = Experts()
        self.norm = RMSNorm(2, 3)


class Tiny(nn.Module):
    """The groups of the real model at the smallest size."""

    def __init__(self):
        super().__init__()
        self.embed = Embedding(7, 6)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].norm1 = RMSNorm(6)
        self.layers[0].q = Biased(6, 6, bias=True)
        self.layers[0].ffn = Ffn()
        self.head = Linear(6, 7, head=True)
        for p in (self.layers[0].norm1.weight, self.layers[0].ffn.norm.weight):
            nn.init.ones_(p)
        nn.init.normal_(self.head.weight)


def _model(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def _grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_every_parameter_is_in_the_group_of_its_kind():
    config = OptimConfig(
        name="muon", lr=1e-3, muon_lr=0.02, embed_lr_scale=2, router_lr_scale=3, expert_lr_scale=5
    )
    optimizers = build_optimizers(_model(), config)
    assert {group.value: names for group, names in optimizers.groups.items()} == {
        "embed": ["embed.weight"],
        "vectors": ["layers.0.norm1.weight", "layers.0.q.bias", "layers.0.ffn.norm.weight"],
        "matrices": ["layers.0.q.weight"],
        "routers": ["layers.0.ffn.router.w_HEL"],
        "experts": ["layers.0.ffn.experts.w_in_HEGFL"],
        "experts_out": ["layers.0.ffn.experts.w_out_HEFL"],
        "head": ["head.weight"],
    }
    rates = {
        g["name"]: (round(g["peak_lr"], 9), g["weight_decay"])
        for o in optimizers.all()
        for g in o.param_groups
    }
    assert rates == {
        "embed": (2e-3, 0.0),
        "head": (2e-3, 0.1),
        "routers": (3e-3, 0.1),
        "vectors": (1e-3, 0.0),
        "matrices": (0.02, 0.1),
        "experts": (0.1, 0.1),
        "experts_out": (0.1, 0.1),
    }
    assert optimizers.muon is not None
    assert [g["transposed"] for g in optimizers.muon.param_groups] == [False, False, True]
    optimizers.set_lr(0.5)
    assert optimizers.adamw.param_groups[0]["lr"] == 1e-3


def test_global_norm_and_clip_equal_torch():
    model, other = _model(), _model()
    _grads(model, 1)
    _grads(other, 1)
    norm = total_norm(p.grad for p in model.parameters())
    exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    assert norm.dtype == torch.float64 and float(norm) == pytest.approx(exact, rel=1e-7)
    theirs = nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(theirs), rel=1e-6)
    scaled = [p.grad * clip_factor(float(norm), 1.0) for p in model.parameters()]
    for a, b in zip(scaled, other.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-6, atol=0)
    assert clip_factor(0.5, 1.0) == 1.0 and clip_factor(1e9, 0.0) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_clipped_step_equals_clipping_first(name):
    model, other = _model(), _model()
    config = OptimConfig(name=name)
    fused, plain = build_optimizers(model, config), build_optimizers(other, config)
    for step in range(3):
        _grads(model, step)
        _grads(other, step)
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        fused.step(clip_factor(float(total_norm(p.grad for p in model.parameters())), 1.0))
        plain.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "name, dtype", [("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32")]
)
def test_state_moves_by_name_and_training_goes_on_bit_for_bit(name, dtype):
    config = OptimConfig(name=name, state_dtype=dtype)
    model = _model()
    optimizers = build_optimizers(model, config)
    for step in range(3):
        _grads(model, step)
        optimizers.step(0.5)
    names = set(optimizers.tensors())
    assert "embed.weight.exp_avg_sq" in names
    assert ("layers.0.q.weight.momentum" in names) == (name == "muon")
    other = _model(seed=1)
    other.load_state_dict(model.state_dict())
    again = build_optimizers(other, config)
    again.load_tensors({k: v.clone() for k, v in optimizers.tensors().items()}, 3)
    for m, o in ((model, optimizers), (other, again)):
        _grads(m, 9)
        o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_optimiser_is_refused():
    model = _model()
    muon = build_optimizers(model, OptimConfig(name="muon"))
    _grads(model, 0)
    muon.step()
    adamw = build_optimizers(model, OptimConfig())
    with pytest.raises(UsageError, match="resume with the same optim.name"):
        adamw.load_tensors(muon.tensors(), 1)
    with pytest.raises(UsageError, match="fits no parameter"):
        adamw.load_tensors({"nothing.exp_avg": torch.ones(1)}, 1)
