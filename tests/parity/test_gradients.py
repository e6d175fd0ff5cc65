"""Gradients are added up in buckets while backward goes on."""

import pytest
import torch

from headway.config import MeshConfig
from headway.model.balance import balance_loss
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.transformer import Transformer
from headway.parallel import reduce
from headway.parallel.parallelize import parallelize
from headway.parallel.reduce import summed_gradients
from tests.parity.test_parity import ROWS, close, heads, rows_of


def sums(mesh, n_bytes):
    """Gradients with buckets of this size; the messages that left during backward, and all."""
    before, reduce.BUCKET = reduce.BUCKET, n_bytes
    model = Transformer(heads(), Compute(dtype=torch.float64), seed=0).double()
    parallelism = parallelize(model, mesh)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(32, (2, ROWS, 8), generator=generator)
    mine = rows_of(mesh, ROWS // mesh.size)
    out = model(tokens[mine], targets[mine], Context(dispatcher=parallelism.dispatcher))
    balance = heads().moe.balance
    loss = out.nats / targets.numel() + balance_loss(out.stats, balance, None) / mesh.size

    def sent():
        return sum(c.calls for key, c in mesh.traffic.counts.items() if key.purpose == "gradients")

    with summed_gradients(model, parallelism.sharding):
        loss.backward()
        during = sent()
    reduce.BUCKET = before
    return {n: p.grad for n, p in model.named_parameters()}, during, sent()


@pytest.mark.parametrize("mesh", [MeshConfig(2), MeshConfig(2, 2), MeshConfig(1, 2, 2)], ids=str)
def test_buckets_leave_during_backward_and_change_nothing(ranks, mesh):
    large, small = (ranks.run(mesh, sums, n) for n in (1 << 30, 3000))
    again = ranks.run(mesh, sums, 3000)
    for (whole, _, once), (pieces, during, often), (same, *_) in zip(
        large, small, again, strict=True
    ):
        assert once <= 3 and often > 5
        assert during >= often - 1  # the last may wait for the gradient of the embedding
        for name, grad in whole.items():
            close(pieces[name], grad, name)
            assert torch.equal(pieces[name], same[name]), name
