"""How much more than its share must the busiest rank read for one token: heads or experts divided?

With hp every rank has whole heads and reads H·K/P experts; with ep it has a part of the experts of
every head and reads those that the router chose there. Counted from recorded routes of trained
models: bytes of the busiest rank over the mean, which is what the slowest rank costs."""

from collections.abc import Sequence

import numpy as np

from headway.lab.measurement import Measurement, Row, Verdict
from studies.routes import ARMS, routes

RANKS = (2, 4, 8)


def busiest(index_TLHK: np.ndarray, n_experts: int, P: int, axis: str) -> float:
    """Experts that the busiest of P ranks reads over the mean of the ranks, for tokens that come
    one at a time: sums over layers, since every layer waits for its slowest rank."""
    H = index_TLHK.shape[2]
    match axis:
        case "hp":
            rank = np.arange(H).reshape(1, 1, H, 1) * P // H + np.zeros_like(index_TLHK)
        case "ep":
            rank = index_TLHK.astype(np.int64) * P // n_experts
        case _:
            raise AssertionError(axis)
    reads = np.stack([(rank == r).sum((2, 3)) for r in range(P)], -1)
    return float(reads.max(-1).sum() / reads.mean(-1).sum())


def measure() -> list[Row]:
    rows = []
    for arm in ARMS:
        recorded = routes(arm)
        moe = recorded.layers[0].config
        tokens = recorded.mixed.reshape(-1, *recorded.mixed.shape[2:])
        for axis in ("hp", "ep"):
            for P in RANKS:
                if axis == "hp" and moe.n_heads % P:
                    continue
                ratio = busiest(tokens, moe.n_experts, P, axis)
                rows.append({"model": arm, "mesh": f"{axis}={P}", "busiest / mean": ratio})
    return rows


def judge(rows: Sequence[Row]) -> Verdict:
    hp = [row["busiest / mean"] for row in rows if row["mesh"].startswith("hp")]
    ep = [row["busiest / mean"] for row in rows if row["mesh"].startswith("ep")]
    holds = max(hp) == 1 and min(ep) > 1.05
    return Verdict(
        "holds" if holds else "refuted",
        f"hp: {max(hp):.2f} at every P; ep: {min(ep):.2f} to {max(ep):.2f}.",
    )


STUDY = Measurement(
    "batch_one_balance",
    "In decoding one sequence every rank of Head Parallel reads the same bytes of experts; the "
    "busiest rank of Expert Parallel reads more than the mean.",
    "Holds if the busiest rank reads exactly the mean with hp, and more than 1.05 of it with ep, "
    "at P = 2, 4 and 8; else refuted.",
    measure,
    judge,
)
