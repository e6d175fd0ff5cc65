"""Bytes that a sparse layer sends over the network, for Head Parallel and for Expert Parallel.

Per token and layer, leaving one rank, P ranks in the group, b bytes per value; (P−1)/P of the
traffic leaves the rank when experts are chosen evenly. Each way is counted: dispatch and combine
forward, the same again backward.

| scheme | forward | shape |
|---|---|---|
| Head Parallel | 2·D_L·b·(P−1)/P | equal sizes, known before the data |
| Expert Parallel | 2·K·D_L·b·(P−1)/P | sizes follow the router |
| Expert Parallel, one copy per rank | 2·c·D_L·b·(P−1)/P | sizes follow the router |

with c = P·(1 − (1 − 1/P)^K). With one head and experts at full width D_L = D. The third line sends
a token once to a rank that holds several of its experts, as DeepEP does; c is the expected number
of ranks when choices are independent.
"""

from headway.config import ModelConfig
from headway.plan.shape import Item, shape_of


def traffic(
    model: ModelConfig, n_ranks: int, bytes_per_value: int = 2, training: bool = True
) -> tuple[Item, ...]:
    """Bytes per token and sparse layer of each scheme; not to be added up. Empty without sparse
    layers.

    Head Parallel needs heads: it is there for Multi-Head LatentMoE alone, and works when P divides
    H. A router that reads the whole token cannot be moved with its head, so Head Parallel then also
    sends H·K indices (int32) and gates (float32), and the gates' gradients back.
    """
    s = shape_of(model)
    if not s.n_sparse:
        return ()
    leaves = (n_ranks - 1) / n_ranks
    ways = 4 if training else 2
    copies = n_ranks * (1 - (1 - 1 / n_ranks) ** s.K)
    values = s.D_L * bytes_per_value
    found = []
    if model.moe.kind == "multi_head_latent":
        routes = 0
        extra = ""
        if model.moe.router.reads == "token":
            routes = s.H * s.K * (12 if training else 8)
            extra = f" + {12 if training else 8}·H·K"
        found.append(
            Item(
                "Head Parallel",
                (ways * values + routes) * leaves,
                f"({ways}·D_L·b{extra})·(P−1)/P" if extra else f"{ways}·D_L·b·(P−1)/P",
            )
        )
    found.append(Item("Expert Parallel", ways * s.K * values * leaves, f"{ways}·K·D_L·b·(P−1)/P"))
    found.append(
        Item(
            "Expert Parallel, one copy per rank",
            ways * copies * values * leaves,
            f"{ways}·P·(1−(1−1/P)^K)·D_L·b·(P−1)/P",
        )
    )
    return tuple(found)
