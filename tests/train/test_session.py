"""A trainer of one's own over a session: other data and another objective, saved and resumed bit for bit."""

import signal

import pytest
import torch

from headway.data.batch import micro_batches
from headway.data.tokenizer import load_tokenizer
from headway.eval.bits_per_byte import Evaluation
from headway.train.open_session import open_session
from headway.train.resolve import resolve
from headway.train.step import gradient, update
from tests.train.test_objective import TokenWeighted, WeightedBatch
from tests.train.tiny_run import assert_same_run, events, quiet, records, tiny


class Pairs:
    """Random pairs of prompt and answer; only answers have weight."""

    identity = {"data": "pairs"}
    info = {"kind": "pairs"}
    notes = ["note: random pairs"]

    def batch(self, step: int) -> WeightedBatch:
        generator = torch.Generator().manual_seed(step % 2)
        tokens, targets = torch.randint(257, (2, 4, 32), generator=generator)
        weights = torch.rand(4, 32, generator=generator) * (torch.arange(32) >= 16)
        return WeightedBatch(tokens_BS=tokens, targets_BS=targets, doc_BS=None, weights_BS=weights)

    @torch.no_grad()
    def evaluate(self, model, parallelism) -> Evaluation:
        batch = self.batch(0)
        model.eval()
        losses = TokenWeighted().losses(model(batch.tokens_BS).logits_BSV, batch)
        model.train()
        return Evaluation(float(losses.sum() / batch.weights_BS.sum()), 1.0)


def finetune(config, resume=None, log=quiet, results=None, interrupt_at=-1):
    tokenizer = load_tokenizer("bytes")
    resolved = resolve(config, tokenizer.vocab_size)
    objective, device = TokenWeighted(), torch.device("cpu")

    def load_pairs(config, tokenizer, mesh, log):
        return Pairs()

    with open_session(resolved, tokenizer, load_pairs, resume=resume, log=log) as session:
        optim, balance = config.optim, config.model.moe.balance
        while session.begin_step():
            if session.progress.step == interrupt_at:
                signal.raise_signal(signal.SIGTERM)
            batches = micro_batches(session.data.batch(session.progress.step), 2, device)
            result = gradient(session.model, batches, objective, load=session.progress.load)
            reason = session.reason_to_skip(result)
            if not reason:
                rate = session.lr_factor
                update(session.model, session.optimizers, result, rate, optim, balance)
            session.end_step(result, reason)
            if results is not None:
                results.append(result)
        return session.finish()


def test_a_trainer_of_ones_own_is_saved_and_resumed_bit_for_bit(tmp_path):
    config = tiny(tmp_path, optim={"steps": 12})
    lines = []
    whole = finetune(config, log=lines.append)
    assert "note: random pairs" in lines and whole["steps"] == 12
    assert whole["loss"] < records(tmp_path)[0]["loss"]
    other = tmp_path / "other"
    config = tiny(other, optim={"steps": 12})
    stopped = finetune(config, interrupt_at=5)
    assert stopped["interrupted"] and stopped["steps"] == 6
    resumed = finetune(config, resume=other / "run")
    assert events(other) == [(6, "interrupted"), (6, "resumed")]
    assert_same_run(tmp_path, other, whole, resumed)


def test_records_hold_the_weighted_mean_of_an_interval(tmp_path):
    results = []
    finetune(tiny(tmp_path, optim={"steps": 3}), results=results)
    (record,) = [r for r in records(tmp_path) if "loss" in r]
    weight = sum(result.weight for result in results)
    assert weight == pytest.approx(
        sum(float(b.weights_BS.sum()) for b in map(Pairs().batch, range(3)))
    )
    assert record["loss"] == pytest.approx(sum(r.loss * r.weight for r in results) / weight)
