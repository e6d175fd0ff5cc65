"""What a decoding step must read: `headway describe --decode`.

Decoding is a question of bytes. A step of B sequences reads every dense weight once, the experts
that its tokens touch, and the keys and values of its contexts:

    weights = dense + heads·touched·(G+1)·F·L·b + head;  touched = E·(1 − (1 − K/E)^B) per head

if choices are uniform and independent; trained routers touch fewer, or more of some.

B sequences · H heads · E experts per head · K chosen · b bytes per value of a weight."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from headway.config import Config, UsageError
from headway.model.build import BlockBuilder, build_block, page_bytes, paged_mixers
from headway.model.compute import Compute
from headway.model.costs import CostGroup, Workload, by_group, parameters
from headway.model.moe import SparseLayer
from headway.model.paged import PAGE
from headway.model.transformer import Transformer

FLOAT32_GROUPS = (CostGroup.ROUTERS, CostGroup.NORMS)
"""Weights that stay float32 in inference."""


def decode_costs(
    config: Config,
    batches: Sequence[int],
    dtype: torch.dtype,
    bandwidth: float,
    context: int = 0,
    measured: dict[int, float] | None = None,
    blocks: BlockBuilder = build_block,
    weights: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Return for each batch what a step reads, and the least time that takes.

    Args:
        config: with a vocabulary.
        dtype: of the matmuls.
        bandwidth: bytes per second that memory is read with.
        context: positions that each sequence holds already.
        measured: experts touched per step in each batch, all sparse layers together; where given,
            bytes are those of these counts.
        weights: dtype of the matrices where it is a narrower one (`kernels.packed`)."""
    if min(batches) < 1:
        raise UsageError(f"--batch {min(batches)} is below 1; use sequences, as in 1,16")
    with torch.device("meta"):
        model = Transformer(config.model, Compute(dtype), blocks=blocks)
    b = (weights or dtype).itemsize
    groups = by_group(model.costs(Workload(1, bytes_per_value=b)), parameters)
    experts = groups.pop(CostGroup.EXPERTS).value if CostGroup.EXPERTS in groups else 0
    V, D = config.model.vocab_size, config.model.d_model
    dense = sum(term.value * (4 if g in FLOAT32_GROUPS else b) for g, term in groups.items())
    if not config.model.tied:
        dense -= V * D * b  # of the embedding, only rows are read
    pages = page_bytes(paged_mixers(model.blocks()), dtype)
    kv_bytes = sum(pages.values()) / PAGE
    held_bytes = sum(n * min(context, window or context) for window, n in pages.items()) / PAGE
    layers = model.sparse_layers()
    n_experts = sum(layer.config.n_heads * layer.config.n_experts for layer in layers)
    rows = []
    for batch in batches:
        uniform = sum(touched(layer, batch) for layer in layers)
        count = uniform if measured is None else measured[batch]
        weight_bytes = dense + batch * D * b + (experts * b * count / n_experts if layers else 0)
        step_bytes = weight_bytes + batch * held_bytes
        rows.append(
            {
                "batch": batch,
                "weight_bytes": round(weight_bytes),
                "experts_touched": round(count, 2),
                "experts_touched_uniform": round(uniform, 2),
                "experts": n_experts,
                "kv_bytes_per_token": round(kv_bytes),
                "context": context,
                "floor_seconds": step_bytes / bandwidth,
            }
        )
    return rows


def touched(layer: SparseLayer, batch: int) -> float:
    """Return how many experts of a sparse layer B tokens touch if choices are uniform."""
    moe = layer.config
    choices = moe.n_experts + moe.n_zero_experts
    return moe.n_heads * moe.n_experts * (1 - (1 - moe.top_k / choices) ** batch)


def read_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Return the bytes per second that one thread reads from memory, the best of `repeats`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, best = torch.ones(megabytes << 18), math.inf
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            x.sum()
            best = min(best, time.perf_counter() - begin)
        return x.nbytes / best
    finally:
        torch.set_num_threads(threads)


def format_decode(rows: Sequence[dict[str, Any]], bandwidth: float) -> str:
    """Format the result of `decode_costs` as a table for people."""
    lines = [
        f"a decoding step reads, {bandwidth / 1e9:.1f} GB/s, "
        f"{rows[0]['kv_bytes_per_token']:,} bytes of cache per position:",
        "  batch   experts touched (uniform)       weights    least time   tokens/s at most",
    ]
    for r in rows:
        counts = f"{r['experts_touched']:,.1f} ({r['experts_touched_uniform']:,.1f})"
        lines.append(
            f"  {r['batch']:>5}   {counts + ' of ' + format(r['experts'], ','):<26}"
            f"{r['weight_bytes'] / 1e6:>10,.1f} MB {r['floor_seconds'] * 1e3:>9,.3f} ms"
            f"{r['batch'] / r['floor_seconds']:>16,.0f}"
        )
    return "\n".join(lines)
