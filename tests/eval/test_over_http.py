"""Pieces of validation windows, scored as a client does, are scored as in one forward pass."""

import pytest
import torch

from headway.config import EngineConfig, UsageError
from headway.data.batch import Batch
from headway.data.tokenizer import ByteTokenizer
from headway.eval import over_http
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from tests.hub.small_runs import MODELS, random_model

S = 24


@pytest.fixture(scope="module")
def model():
    return random_model(MODELS["multi_head"])


def batch(doc_BS=None) -> Batch:
    """Three windows; the last one ends early."""
    window = torch.randint(256, (3, S + 1), generator=torch.Generator().manual_seed(2))
    targets_BS = window[:, 1:].clone()
    targets_BS[2, 9:] = -1
    return Batch(window[:, :-1].contiguous(), targets_BS, doc_BS)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 19, [0] * S, [0] * 8 + [1] + [2] * 15]).int()


@pytest.mark.parametrize("doc_BS", [None, DOCUMENTS], ids=["whole", "documents"])
def test_pieces_score_as_windows_do(model, doc_BS, monkeypatch):
    engine = Engine(model, ByteTokenizer(), EngineConfig(max_len=S))

    def score(connection, prompts):
        requests = [engine.add(p, SamplingParams(max_tokens=0, prompt_logprobs=0)) for p in prompts]
        while engine.has_work:
            engine.step()
        return [[t and t.logprob for t in request.prompt_logprobs] for request in requests]

    monkeypatch.setattr(over_http, "_score", score)
    windows = batch(doc_BS)
    there_BS = over_http._over_http(None, windows)  # type: ignore[arg-type]
    here_BS = over_http._here(model, ByteTokenizer().vocab_size, windows)
    asked_BS = ~there_BS.isnan()
    assert (there_BS - here_BS)[asked_BS].abs().max() < 1e-5
    # all but what does not exist, and the last token of a window that fills the context
    missing_BS = windows.targets_BS < 0
    missing_BS[:, -1] |= torch.tensor([doc_BS is None, True, True])
    assert (asked_BS == ~missing_BS).all()


def test_a_server_that_does_not_start_is_named(tmp_path):
    with (
        pytest.raises(UsageError, match=r"did not start: headway: .*neither a run"),
        over_http.server([str(tmp_path)]),
    ):
        raise AssertionError("it started")
