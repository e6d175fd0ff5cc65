"""Rows of a batch, divided into micro-batches and among ranks."""

from dataclasses import dataclass

import torch

from headway.data.batch import Batch, micro_batches, rank_rows


def test_ranks_take_all_rows_once_and_as_many_each():
    tokens = torch.arange(15).view(5, 3)
    whole = Batch(tokens, tokens + 1, tokens.int(), torch.arange(5.0))
    parts = [rank_rows(whole, rank, 4) for rank in range(4)]
    assert [len(p.tokens_BS) for p in parts] == [2] * 4
    targets = torch.cat([p.targets_BS for p in parts])
    assert torch.equal(targets[:5], tokens + 1) and (targets[5:] == -1).all()
    assert sum(float(p.bytes_B.sum()) for p in parts if p.bytes_B is not None) == 10


def test_micro_batches_are_the_rows_in_order():
    tokens = torch.arange(15).view(5, 3)
    batch = Batch(tokens, tokens + 1, tokens.int())
    parts = micro_batches(batch, 2, torch.device("cpu"))
    assert [len(p.tokens_BS) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.targets_BS for p in parts]), tokens + 1)
    assert torch.equal(torch.cat([p.doc_BS for p in parts if p.doc_BS is not None]), tokens.int())
    plain = micro_batches(Batch(tokens, tokens, None), 5, torch.device("cpu"))
    assert len(plain) == 1 and plain[0].doc_BS is None


@dataclass(frozen=True, kw_only=True)
class Weighted(Batch):
    weights_BS: torch.Tensor


def test_fields_of_a_subclass_are_divided_too():
    tokens = torch.arange(15).view(5, 3)
    batch = Weighted(tokens_BS=tokens, targets_BS=tokens, doc_BS=None, weights_BS=tokens / 2)
    parts = micro_batches(batch, 2, torch.device("cpu"))
    assert torch.equal(torch.cat([p.weights_BS for p in parts]), tokens / 2)
    weights = torch.cat([rank_rows(batch, rank, 2).weights_BS for rank in (0, 1)])
    assert torch.equal(weights[:5], tokens / 2) and (weights[5:] == 0).all()
