"""The validation text as a client of the server scores it: the proof that the log-probabilities of
`headway serve` are those of the model.

Windows go to `/v1/completions` as prompts of token ids with `echo` and `logprobs`, in pieces of one
document each. The last token of a piece is scored too where the context has room for it. Both sides
normalise over the tokenizer's vocabulary; the loss of training has the rows that pad it in its sum,
too."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from headway.config import UsageError
from headway.data.batch import Batch
from headway.data.stream import Stream
from headway.eval.bits_per_byte import bits_per_byte
from headway.model.context import Context
from headway.model.transformer import Transformer

WINDOWS, PROMPTS = 8, 16
"""Validation windows that are compared at a time; prompts of one request."""


class Difference(NamedTuple):
    """Log-probabilities over HTTP minus those of a forward pass in this process."""

    via_http_difference: float
    """Of bits per byte, those over HTTP minus those here."""
    via_http_largest: float
    """Largest |Δ log p| of a token, nats."""
    via_http_tokens: int
    """Tokens that were compared."""


@contextmanager
def server(words: Sequence[str]) -> Iterator[str]:
    """Run `headway serve WORDS` on a free port of this machine; yield its URL. Raises UsageError
    with the server's last line where it does not start."""
    command = [sys.executable, "-m", "headway", "serve", *words, "--port", "0", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "HEADWAY_API_KEY"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if not ready:
                errors.seek(0)
                lines = errors.read().strip().splitlines() or ["it ended"]
                raise UsageError(f"the server did not start: {lines[-1]}")
            yield json.loads(ready)["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


def compare(
    model: Transformer, vocab_size: int, stream: Stream, n_windows: int, url: str
) -> Difference:
    """Score the first `n_windows` validation windows with `model` and at `url`, a server of it.
    `vocab_size`: of the tokenizer."""
    nats = n_bytes = largest = 0.0
    n_tokens = 0
    address = urlsplit(url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=600)
    for begin in range(0, n_windows, WINDOWS):
        batch = stream.val_windows(begin, min(begin + WINDOWS, n_windows))
        assert batch.bytes_B is not None
        delta_BS = _over_http(connection, batch) - _here(model, vocab_size, batch)
        delta = delta_BS[~delta_BS.isnan()]
        nats, n_bytes = nats - float(delta.sum()), n_bytes + float(batch.bytes_B.sum())
        largest = max(largest, float(delta.abs().max()))
        n_tokens += delta.numel()
    connection.close()
    return Difference(bits_per_byte(nats, n_bytes), largest, n_tokens)


@torch.no_grad()
def _here(model: Transformer, vocab_size: int, batch: Batch) -> torch.Tensor:
    """Return log p of each target by a forward pass, float64 `[B, S]`; window by window, since the
    logits of one are in memory."""
    out_BS = torch.zeros(batch.tokens_BS.shape, dtype=torch.float64)
    for row, (tokens_S, targets_S) in enumerate(
        zip(batch.tokens_BS, batch.targets_BS, strict=True)
    ):
        doc_BS = None if batch.doc_BS is None else batch.doc_BS[row : row + 1].to(model.device)
        logits_BSV = model(tokens_S.to(model.device).unsqueeze(0), ctx=Context(doc_BS)).logits_BSV
        assert logits_BSV is not None
        logprobs_SV = logits_BSV[0, :, :vocab_size].log_softmax(-1).cpu()
        out_BS[row] = logprobs_SV.gather(1, targets_S.clamp(min=0).unsqueeze(1))[:, 0]
    return out_BS


def _over_http(connection: HTTPConnection, batch: Batch) -> torch.Tensor:
    """Return log p of each target as the server gives it, float64 `[B, S]`, NaN where it was not
    asked for."""
    out_BS = torch.full(batch.tokens_BS.shape, math.nan, dtype=torch.float64)
    pieces = list(_pieces(batch))
    for first in range(0, len(pieces), PROMPTS):
        part = pieces[first : first + PROMPTS]
        scores = _score(connection, [prompt for _, _, prompt in part])
        for (row, start, prompt), logprobs in zip(part, scores, strict=True):
            n = len(prompt) - 1
            out_BS[row, start : start + n] = torch.tensor(logprobs[1 : n + 1], dtype=torch.float64)
    return out_BS.where(batch.targets_BS >= 0, math.nan)


def _pieces(batch: Batch) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (row, first position, prompt) of each run of tokens of one document."""
    B, S = batch.tokens_BS.shape
    for row in range(B):
        begins = [0]
        if batch.doc_BS is not None:
            changes = batch.doc_BS[row, 1:] != batch.doc_BS[row, :-1]
            begins += (1 + changes.nonzero().flatten()).tolist()
        for start, end in zip(begins, [*begins[1:], S], strict=True):
            prompt = batch.tokens_BS[row, start:end].tolist()
            target = int(batch.targets_BS[row, end - 1])
            if target >= 0 and len(prompt) < S:
                prompt.append(target)
            if len(prompt) > 1:
                yield row, start, prompt


def _score(connection: HTTPConnection, prompts: list[list[int]]) -> list[list[float | None]]:
    """Return log p of each token of the prompts, None for the first."""
    body = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    if response.status != 200:
        raise UsageError(f"the server answered {response.status}: {text[:300]}")
    choices = sorted(json.loads(text)["choices"], key=lambda choice: choice["index"])
    return [choice["logprobs"]["token_logprobs"] for choice in choices]
