"""N ranks equal one process: loss, every gradient, the norm, the clip factor and five updates, in
float64."""

import pytest
import torch

from headway.config import (
    BalanceConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
)
from headway.data.stream import Batch
from headway.model.transformer import Transformer
from headway.parallel.exchange import spread
from headway.parallel.gathered import whole
from headway.train.evaluate import micro_batches
from headway.train.optim import build_optimizers, clip_factor
from headway.train.step import gradient, update

BOUND = 1e-12
STEPS = 5
ROWS = 16


def model_config(kind="multi_head_latent", **changes):
    values = {
        "n_heads": 4 if kind == "multi_head_latent" else 1,
        "n_experts": 8,
        "top_k": 3,
        "d_expert": 8,
        "balance": BalanceConfig(aux=0.05, z=1e-3),
    }
    moe = MoEConfig(kind=kind, **(values | changes))
    return ModelConfig(vocab_size=32, n_layers=2, d_model=32, n_heads=2, d_ff=32, moe=moe)


def train(mesh, config, optim, micro, whole_micro, skew=False):
    """Five steps on this rank's rows; everything that must not depend on the mesh."""
    model = Transformer(config, dtype=torch.float64, seed=0).double()
    if skew:  # every router prefers the same experts, so that others get no token
        with torch.no_grad():
            for layer in model.sparse_layers():
                layer.router.bias_HE[:, : layer.router.top_k] = 1e3
    apart = spread(model, mesh)
    optimizers = build_optimizers(model, optim, torch.float64, apart.layout)
    found = []
    for step in range(STEPS):
        at_once = mesh.size * micro
        mine = (
            [
                r
                for i in range(0, ROWS, at_once)
                for r in range(i + mesh.rank * micro, i + (mesh.rank + 1) * micro)
            ]
            if mesh.size > 1
            else list(range(ROWS))
        )
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(32, (2, ROWS, 8), generator=generator)
        targets[0, :5] = -1
        batch = Batch(tokens[mine], targets[mine], None)
        micros = micro_batches(batch, micro if mesh.size > 1 else whole_micro, torch.device("cpu"))
        got = gradient(model, micros, int((batch.targets_BS >= 0).sum()), config.moe.balance, apart)
        grads = whole(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, apart
        )
        found.append(
            {
                "nats": got.nats,
                "balance": got.balance,
                "norm": got.norm,
                "targets": got.targets,
                "clip": clip_factor(got.norm, optim.clip),
                "counts": [r.counts_HE for r in got.routes],
                "entropy": [r.entropy_H for r in got.routes],
                "grads": grads,
            }
        )
        update(model, optimizers, got, 1.0, optim, config.moe.balance, apart)
        optimizers.zero_grad()
    return found, whole(dict(model.state_dict()), apart), mesh.traffic.total()


def close(a, b, what):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    assert error < BOUND, f"{what}: {error:.1e}"


def compare(one, many):
    for step, (a, b) in enumerate(zip(one[0], many[0], strict=True)):
        for key in ("nats", "balance", "norm", "clip", "targets"):
            close(b[key], a[key], f"{key} of step {step}")
        for layer, (x, y) in enumerate(zip(a["counts"], b["counts"], strict=True)):
            assert torch.equal(x, y), f"counts of layer {layer}, step {step}"
        assert a["grads"].keys() == b["grads"].keys()
        for name, grad in a["grads"].items():
            close(b["grads"][name], grad, f"gradient of {name}, step {step}")
    for name, value in one[1].items():
        if value.numel():
            close(many[1][name], value, name)


OPTIM = OptimConfig(lr=1e-3, clip=0.5)


def check(ranks, mesh, config, optim=OPTIM, micro=None, one_micro=None, skew=False):
    size = mesh.dp * mesh.hp * mesh.ep
    micro = micro or ROWS // size
    one = ranks.run(MeshConfig(), train, config, optim, micro, one_micro or micro * size, skew)[0]
    many = ranks.run(mesh, train, config, optim, micro, None, skew)
    for answer in many:
        compare(one, answer)


@pytest.mark.parametrize(
    "axes",
    [
        (1, 2, 1),
        (1, 1, 2),
        (2, 1, 1),
        (1, 4, 1),
        (1, 1, 4),
        (2, 2, 1),
        (1, 2, 2),
        (2, 1, 2),
        (2, 2, 2),
    ],
    ids=lambda a: "dp{}-hp{}-ep{}".format(*a),
)
@pytest.mark.parametrize("reads", ["sub_token", "token"])
def test_multi_head(ranks, axes, reads):
    check(ranks, MeshConfig(*axes), model_config(router=RouterConfig(reads=reads)))
