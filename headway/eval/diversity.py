"""How different the documents of a set are.

Vendi score (Friedman and Dieng 2023): exp of the entropy of the eigenvalues of K/n, K the cosines
of n documents; 1 where all are equal, n where all are orthogonal. It grows with n: compare sets at
the same n. G-Vendi (Jung et al. 2025, Prismatic Synthesis) is that of the gradients of a model:
what a set would teach it.

N documents · D features."""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from headway.data.near_duplicates import clusters, minima
from headway.model.transformer import Transformer

FEATURES = 256
PROJECTED = 1024
"""Dimensions that gradients are projected to."""
DRAWS = 100
"""Half samples of an interval."""
CHUNK = 8192
"""Parameters that are projected at once."""
GRADIENTS = 1 << 26
"""Values of gradients that are held at once, 256 MB; at least those of one document."""
BATCH = 64
"""Documents whose gradients are held at once, where they are small."""
FEWEST = 4
"""Documents of an interval: halves of one document are all alike."""
_WORD = re.compile(r"\w+|[^\w\s]")


class Diversity(NamedTuple):
    """A score of a set, with its 95% interval over documents."""

    value: float
    ci95: tuple[float, float] | None
    """None for fewer than four documents."""


def hashed_words(texts: Sequence[str], dim: int = FEATURES) -> np.ndarray:
    """Return unit vectors of the words and pairs of words of texts, hashed with signs to `dim`
    features, each with √ of its count; float64 [N, dim]. An empty text is 0."""
    x_ND = np.zeros((len(texts), dim))
    for row_D, text in zip(x_ND, texts, strict=True):
        words = _WORD.findall(text.lower())
        if not words:
            continue
        single = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
        pairs = (single[:-1] * np.uint64(0x9E3779B1) + single[1:]) & np.uint64(0xFFFFFFFF)
        values, counts = np.unique(np.concatenate([single, pairs]), return_counts=True)
        sign = np.where(values >> np.uint64(16) & np.uint64(1), 1.0, -1.0)
        place = (values * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(dim)
        row_D += np.bincount(place.astype(np.int64), sign * np.sqrt(counts), dim)
    return unit(x_ND)


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Return rows of length 1; those that are 0 stay."""
    size = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(size > 0, size, 1.0)


def vendi(x_ND: np.ndarray, order: float = 1.0) -> float:
    """Return the Vendi score of unit rows: (Σ λ^q)^(1/(1−q)) of the eigenvalues λ of X·Xᵀ/N, or of
    the smaller Xᵀ·X/N, which has the same; q = 1 is exp of Shannon's entropy, ∞ is 1/max λ."""
    N, D = x_ND.shape
    gram = (x_ND.T @ x_ND if D < N else x_ND @ x_ND.T) / N
    value = np.linalg.eigvalsh(gram)
    value = value[value > 1e-12]
    if order == 1:
        return float(np.exp(-(value * np.log(value)).sum()))
    if math.isinf(order):
        return float(1 / value.max())
    return float((value**order).sum() ** (1 / (1 - order)))


def mean_cosine(x_ND: np.ndarray, centre_D: np.ndarray | None = None) -> float:
    """Return the mean cosine of two different documents. Documents share much, so that it saturates
    unless a centre is taken away: the mean of all sets that are compared."""
    x_ND = unit(x_ND if centre_D is None else x_ND - centre_D)
    N = len(x_ND)
    return float(((x_ND.sum(0) ** 2).sum() - (x_ND**2).sum()) / (N * (N - 1)))


def near_duplicate_rate(texts: Sequence[str]) -> float:
    """Return the share of texts that have a near-copy among the others (`data.near_duplicates`:
    Jaccard 0.8 of runs of five words). Raises UsageError without datasketch (extra `[data]`)."""
    return clusters(np.stack([minima(text) for text in texts])).documents / len(texts)


def with_interval(
    x_ND: np.ndarray, score: Callable[[np.ndarray], float], seed: int = 0, draws: int = DRAWS
) -> Diversity:
    """Return a score of a set, above 0, and its 95% interval by half samples.

    Drawing documents with replacement would count the copies as lack of diversity. Halves drawn
    without it spread around their mean, in the logarithm, as sets of N around theirs."""
    N, value = len(x_ND), score(x_ND)
    if N < FEWEST:
        return Diversity(value, None)
    generator = np.random.default_rng(seed)
    logs = np.log([score(x_ND[generator.permutation(N)[: N // 2]]) for _ in range(draws)])
    low, high = np.exp(math.log(value) + np.quantile(logs - logs.mean(), [0.025, 0.975]))
    return Diversity(value, (float(low), float(high)))


def gradients(
    model: Transformer, ids: Sequence[Sequence[int]], dim: int = PROJECTED, seed: int = 0
) -> np.ndarray:
    """Return for each document the direction of the gradient of its mean loss by the parameters of
    the last block, projected to `dim` with random signs (which keeps cosines to about 1/√dim) and
    of length 1; float64 [N, dim].

    Args:
        model: not packed for inference.
        ids: documents of two tokens or more, no longer than the context."""
    parameters = list(model.blocks()[-1].parameters())
    size = max(1, min(BATCH, GRADIENTS // sum(p.numel() for p in parameters)))
    rows = []
    for first in range(0, len(ids), size):
        batch_BP = torch.stack(
            [_gradient(model, part, parameters) for part in ids[first : first + size]]
        )
        rows.append(_projected(batch_BP, dim, seed))
    return unit(np.concatenate(rows))


def _gradient(
    model: Transformer, ids: Sequence[int], parameters: list[torch.nn.Parameter]
) -> torch.Tensor:
    """Return the gradient of one document, of length 1, float32 `[P]` on the CPU."""
    tokens_BS = torch.tensor([ids], device=model.device)
    nats = model(tokens_BS[:, :-1], tokens_BS[:, 1:]).nats
    parts = torch.autograd.grad(nats, parameters, allow_unused=True, materialize_grads=True)
    return F.normalize(torch.cat([part.flatten().float() for part in parts]), dim=0).cpu()


def _projected(x_BP: torch.Tensor, dim: int, seed: int) -> np.ndarray:
    """Return X·R/√dim with R of random signs, which depend on the seed alone."""
    out = np.zeros((len(x_BP), dim))
    for chunk, x_BC in enumerate(x_BP.split(CHUNK, dim=1)):
        generator = np.random.default_rng((seed, chunk))
        signs = generator.integers(0, 2, (x_BC.shape[1], dim), dtype=np.int8) * 2 - 1
        out += x_BC.numpy() @ signs.astype(np.float32)
    return out / math.sqrt(dim)
