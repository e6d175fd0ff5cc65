"""Sampling: the next token of each running choice, from the logits of a step.

The order, for every row: logit bias; repetition, presence and frequency penalty; `min_tokens`,
allowed tokens and grammar; temperature; top-k; top-p over what top-k left; min-p. Ties go to the
lowest id. A token is then drawn by inverse CDF, the likeliest first (in the order of ids where no
token is cut), at a number in 0 … 1 that is a function of (seed, choice, position) alone.

It runs in NumPy on the CPU. Every operation works along one row in a fixed order, so that the bits
of a row do not depend on what else is in the batch. No ids are sorted: the sorted *values* decide
how many tokens are candidates and which value is drawn, and the id is looked up (NumPy sorts floats
with AVX512 or AVX2, several times faster than their ids)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headway.config import RunError
from headway.serve.params import Matcher, SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below it take the most likely token, as in vLLM."""

CHUNK = 2**16
"""Logits that are worked on at a time: their intermediate values stay in the L2 cache, and fresh
memory of megabytes would cost more page faults than the arithmetic takes."""


class TokenLogprob(NamedTuple):
    """A token with its log-probability and the most likely tokens at its place."""

    token: int
    logprob: float
    """Log-softmax of the raw logits over the tokenizer's vocabulary."""
    top: tuple[tuple[int, float], ...]
    """Pairs (token, log-probability), the likeliest first; () where none were asked for."""


@dataclass(slots=True, eq=False)
class Row:
    """One choice of a request as sampling sees it."""

    params: SamplingParams
    seed: int
    """The request's own, or the one that was drawn for it; int64."""
    choice: int
    prompt: Sequence[int]
    output: list[int]
    """The reply so far; its length is the position of the draw. Tokens are only appended."""
    eos_ids: tuple[int, ...]
    matcher: Matcher | None = None
    _seen: dict[int, int] = field(default_factory=dict)
    """How often each token of prompt and reply is in the reply, as far as `_n_counted` of it."""
    _n_counted: int = -1

    @property
    def number(self) -> float:
        """The number in 0 ≤ u < 1 that the next token is drawn with."""
        return uniform(self.seed, self.choice, len(self.output))

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of prompt and reply, int64 [N], and how often each is in the reply."""
        if self._n_counted < 0:
            self._seen, self._n_counted = dict.fromkeys(self.prompt, 0), 0
        for token in self.output[self._n_counted :]:
            self._seen[token] = self._seen.get(token, 0) + 1
        self._n_counted = len(self.output)
        n = len(self._seen)
        return np.fromiter(self._seen, np.int64, n), np.fromiter(self._seen.values(), np.int64, n)


def sample(logits_RV: Tensor, rows: Sequence[Row]) -> list[TokenLogprob]:
    """Draw the next token of each row, with `SamplingParams.logprobs` of the likeliest.

    `logits_RV` float32 `[R, V]` has the columns of the tokenizer's vocabulary alone (a padded
    vocabulary is cut before) and is not changed. Raise RunError for NaN and infinity in them."""
    raw_RV = np.ascontiguousarray(logits_RV.detach().cpu().numpy())
    return [token for c in _chunks(raw_RV) for token in _sample(raw_RV[c], rows[c])]


def log_probabilities(
    logits_RV: Tensor, token_R: Sequence[int], n_top: int = 0
) -> list[TokenLogprob]:
    """Return log-probabilities of tokens that are not drawn but given, as those of a prompt, and of
    the `n_top` likeliest in each row. Bits and errors are those of `sample`."""
    raw_RV = np.ascontiguousarray(logits_RV.detach().cpu().numpy())
    tokens = np.asarray(token_R, np.int64)
    _check_finite(raw_RV)
    result = []
    for chunk in _chunks(raw_RV):
        part = tokens[chunk]
        result += _log_probabilities(raw_RV[chunk], part, [n_top] * len(part))
    return result


def uniform(seed: int, choice: int, position: int) -> float:
    """Return the number in 0 ≤ u < 1 that the token at a position is drawn with: 52 bits of
    Philox4x64-10 (Salmon et al. 2011) with key (seed, choice) and counter `position`."""
    key = np.array([seed % 2**64, choice], np.uint64)
    return int(np.random.Philox(counter=position, key=key).random_raw() >> 12) * 2.0**-52


def _chunks(raw_RV: np.ndarray) -> Iterator[slice]:
    """Yield the rows that are worked on together."""
    step = max(1, CHUNK // max(1, raw_RV.shape[1]))
    return (slice(r, r + step) for r in range(0, len(raw_RV), step))


def _check_finite(raw_RV: np.ndarray) -> None:
    """Raise RunError for a row whose largest logit is NaN or infinite."""
    peak_R = raw_RV.max(axis=1)
    if not np.isfinite(peak_R).all():
        raise RunError(f"the model's largest logit is {peak_R.max()}; nothing can be drawn from it")


def _sample(raw_RV: np.ndarray, rows: Sequence[Row]) -> list[TokenLogprob]:
    """Draw the next token of rows that fit the processor's cache together."""
    _check_finite(raw_RV)
    x_RV = raw_RV.copy() if any(map(_changes, rows)) else raw_RV
    for x_V, row in zip(x_RV, rows, strict=True):
        if _changes(row):
            _change(x_V, row)
    token_R = x_RV.argmax(axis=1)  # the first of equal ones
    groups: dict[str, list[int]] = {}
    for r, row in enumerate(rows):
        groups.setdefault(_way(row.params, raw_RV.shape[1]), []).append(r)
    for way, group in groups.items():
        if way == "all":
            token_R[group] = _draw(x_RV[group], [rows[r] for r in group])
        elif way != "greedy":
            token_R[group] = _draw_cut(x_RV[group], [rows[r] for r in group], way == "few")
    tops = [row.params.logprobs for row in rows]
    return _log_probabilities(raw_RV, token_R, tops)


def _changes(row: Row) -> bool:
    """Say whether anything but temperature and cuts applies to a row's logits."""
    p = row.params
    return (
        bool(p.logit_bias or p.allowed_token_ids)
        or row.matcher is not None
        or len(row.output) < p.min_tokens
        or (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
    )


def _change(x_V: np.ndarray, row: Row) -> None:
    """Apply bias, penalties and masks to the logits of one row, in place."""
    p = row.params
    for token, bias in p.logit_bias:
        x_V[token] += np.float32(bias)
    if (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0):
        tokens_N, times_N = row.counts()
        x_N, factor = x_V[tokens_N], np.float32(p.repetition_penalty)
        x_N = np.where(x_N > 0, x_N / factor, x_N * factor)
        x_N -= np.float32(p.frequency_penalty) * times_N.astype(np.float32)
        x_N -= np.float32(p.presence_penalty) * (times_N > 0)
        x_V[tokens_N] = x_N
    early = len(row.output) < p.min_tokens
    if not (p.allowed_token_ids or row.matcher is not None or early):
        return
    allowed_V = np.ones(len(x_V), bool) if row.matcher is None else row.matcher.mask()
    if p.allowed_token_ids:
        allowed_V = np.zeros(len(x_V), bool)
        allowed_V[list(p.allowed_token_ids)] = True
    if early:  # unless nothing else may follow, as at the end of a grammar
        without_ends_V = allowed_V.copy()
        without_ends_V[np.array([*row.eos_ids, *p.stop_token_ids], np.int64)] = False
        allowed_V = without_ends_V if without_ends_V.any() else allowed_V
    assert allowed_V.any(), "a mask leaves at least one token"
    np.copyto(x_V, -np.inf, where=~allowed_V)


def _way(p: SamplingParams, n_vocab: int) -> str:
    """Return how the tokens of a row are looked at: `greedy`, the `few` that top_k leaves, `sorted`
    by probability, or `all` where nothing is cut."""
    if p.temperature < GREEDY_BELOW:
        return "greedy"
    if 0 < p.top_k <= n_vocab // 8:
        return "few"
    cut = 0 < p.top_k < n_vocab or p.top_p < 1 or p.min_p > 0
    return "sorted" if cut else "all"


def _draw(x_RV: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """Draw from all tokens of rows with a temperature: int64 `[R]`."""
    _, mass_RV = _mass(x_RV.max(axis=1, keepdims=True) - x_RV, rows)
    return _at(
        mass_RV, [row.number * float(mass) for row, mass in zip(rows, mass_RV[:, -1], strict=True)]
    )


def _draw_cut(x_RV: np.ndarray, rows: Sequence[Row], few: bool) -> np.ndarray:
    """Draw from what top_k, top_p and min_p leave of rows with a temperature: int64 `[R]`. With
    `few`, all rows have a top_k, and only the largest values W of the rows are looked at."""
    n_vocab = x_RV.shape[1]
    x_RW = -x_RV  # negative, because NumPy sorts upwards
    if few:
        width = max(row.params.top_k for row in rows)
        x_RW = np.partition(x_RW, width - 1, axis=1)[:, :width]
    x_RW.sort(axis=1)
    e_RW, mass_RW = _mass(x_RW - x_RW[:, :1], rows)
    targets = []
    for row, e_W, mass_W in zip(rows, e_RW, mass_RW.numpy(), strict=True):
        p = row.params
        n = min(p.top_k or n_vocab, n_vocab)
        if p.top_p < 1:  # a token stays if the mass before it is short of p
            n = min(n, int(np.searchsorted(mass_W[:n], p.top_p * mass_W[n - 1])) + 1)
        if p.min_p > 0:
            n = min(n, int(np.count_nonzero(e_W >= np.float32(p.min_p))))
        targets.append(row.number * float(mass_W[n - 1]))
    index_R = _at(mass_RW, targets)
    is_drawn_RV = x_RV == -x_RW[np.arange(len(rows)), index_R][:, None]
    token_R = is_drawn_RV.argmax(axis=1)
    for r, i in enumerate(index_R):
        if i > 0 and x_RW[r, i - 1] == x_RW[r, i]:  # equal ones: in the order of their ids
            rank = i - int(np.searchsorted(x_RW[r], x_RW[r, i]))
            token_R[r] = np.flatnonzero(is_drawn_RV[r])[rank]
    return token_R


def _mass(below_RW: np.ndarray, rows: Sequence[Row]) -> tuple[np.ndarray, Tensor]:
    """Return probabilities over the highest one, and their sums from the left in float64, for
    logits that are `below_RW` below the highest one, which is overwritten."""
    below_RW /= np.array([[-row.params.temperature] for row in rows], np.float32)
    e_RW = np.exp(below_RW, out=below_RW)
    return e_RW, torch.from_numpy(e_RW).cumsum(1, dtype=torch.float64)  # along a row, in order


def _at(mass_RW: Tensor, targets: list[float]) -> np.ndarray:
    """Return the first index of each row at which the sum is above a target, int64 `[R]`."""
    target_R1 = torch.tensor(targets, dtype=torch.float64)[:, None]
    return torch.searchsorted(mass_RW, target_R1, right=True)[:, 0].numpy()


def _log_probabilities(
    raw_RV: np.ndarray, token_R: np.ndarray, n_top_R: Sequence[int]
) -> list[TokenLogprob]:
    """Return log-probabilities of a token per row and of the likeliest ones of each row."""
    peak_R1 = raw_RV.max(axis=1, keepdims=True)
    mass_R = np.exp(raw_RV - peak_R1).sum(axis=1)  # NumPy adds a row's halves, whatever the rows
    norm_R = peak_R1[:, 0].astype(np.float64) + np.log(mass_R.astype(np.float64))
    logprob_R = raw_RV[np.arange(len(token_R)), token_R] - norm_R
    top_R = []
    for x_V, norm, n_top in zip(raw_RV, norm_R, n_top_R, strict=True):
        n = min(n_top, len(x_V))
        ids = np.empty(0, np.int64)
        if n > 0:
            ids = np.flatnonzero(x_V >= np.partition(x_V, len(x_V) - n)[len(x_V) - n])
            ids = ids[np.argsort(-x_V[ids], kind="stable")][:n]
        top_R.append(tuple(zip(ids.tolist(), (x_V[ids] - norm).tolist(), strict=True)))
    return list(map(TokenLogprob, token_R.tolist(), logprob_R.tolist(), top_R))
