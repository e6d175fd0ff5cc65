"""Bytes that leave one rank for a sparse layer, from plain integers, for Head and Expert Parallel.

T tokens of the rank · H heads · L width of a head (D_L = H·L) · E experts per head · K chosen ·
N sub-tokens of the rank (T·H, which the exchange of heads leaves as many) · P ranks of the axis ·
b bytes of a value (1 float8, 2 bfloat16, 4 float32, 8 float64) · g bytes of a gate (4; 8 where b is
8) · i bytes of an index (2 where H·E < 32768, else 4). What a rank keeps for itself is not on the
wire.

| scheme | dispatch | combine | backward of combine | backward of dispatch |
|---|---|---|---|---|
| Head Parallel | T·D_L·b·(P−1)/P | the same | the same | the same |
| … router on the token | + T·H·K·(i+g)·(P−1)/P | | | + T·H·K·g·(P−1)/P |
| Expert Parallel, one copy per slot, R rows | R·(L·b + i) | R·L·b | R·L·b | R·L·b |
| … one copy per rank, R rows | R·(L·b + K·(i+g)) | R·L·b | R·L·b | R·(L·b + K·g) |
| … all-gather | N·(L·b + K·(i+g))·(P−1) | N·L·b·(P−1) | the same | N·(L·b + K·g)·(P−1) |

The R rows that leave follow the router: N·K·(P−1)/P with a copy per slot and even choices, and
N·c·(P−1)/P with a copy per rank, c = P·(1 − (1 − 1/P)^K) being the expected number of ranks among K
independent choices; an exchange of their counts, 8·(P−1) bytes, comes first. The other schemes have
sizes that are fixed in advance. One copy per rank is what DeepEP does. A sub-token in float8 brings
its float32 scale: L + 4 bytes in place of L·b.
"""

from typing import Literal, NamedTuple

from headway.config import MeshConfig, ModelConfig
from headway.plan.shape import Item, shape_of

Scheme = Literal["all_to_all", "all_to_all_per_slot", "all_gather"]
"""How sub-tokens travel on the `ep` axis: one copy per rank, one copy per slot, or all to all
ranks."""

SCHEMES: tuple[Scheme, ...] = ("all_to_all", "all_to_all_per_slot", "all_gather")


class Trips(NamedTuple):
    """Bytes leaving one rank in each of the four exchanges of a layer. Integers for integer
    arguments, where the sizes divide."""

    dispatch: float
    combine: float
    combine_backward: float
    dispatch_backward: float

    @property
    def forward(self) -> float:
        return self.dispatch + self.combine

    @property
    def total(self) -> float:
        return sum(self)


def index_bytes(n_heads: int, n_experts: int) -> int:
    """i: the width of an index among H·E experts."""
    return 2 if n_heads * n_experts < 32768 else 4


def payload_bytes(mesh: MeshConfig, bytes_per_value: int) -> int:
    """b of sub-tokens on the wire, where the matmuls have `bytes_per_value`."""
    return 1 if mesh.payload == "float8" else bytes_per_value


def row_bytes(width: int, bytes_per_value: int) -> int:
    """Of a sub-token: L·b, and 4 for its scale where b is 1 (`mesh.payload=float8`)."""
    return width * bytes_per_value + (4 if bytes_per_value == 1 else 0)


def gate_bytes(bytes_per_value: int) -> int:
    """g: gates are float32, and float64 where everything is."""
    return 8 if bytes_per_value == 8 else 4


def expected_ranks(top_k: int, n_ranks: int) -> float:
    """c: distinct ranks among K independent, even choices of P ranks."""
    return n_ranks * (1 - (1 - 1 / n_ranks) ** top_k)


def expected_rows(n_sub_tokens: float, top_k: int, n_ranks: int, scheme: Scheme) -> float:
    """R: rows that are expected to leave a rank under an all-to-all scheme."""
    assert scheme != "all_gather"
    copies = expected_ranks(top_k, n_ranks) if scheme == "all_to_all" else top_k
    return n_sub_tokens * copies * (n_ranks - 1) / n_ranks


def head_bytes(
    n_tokens: int,
    n_heads: int,
    width: int,
    top_k: int,
    n_experts: int,
    n_ranks: int,
    bytes_per_value: int,
    *,
    reads_token: bool = False,
) -> Trips:
    """Head Parallel, T tokens of H heads of width L over P ranks; exact when P divides H.

    `reads_token`: the router reads the whole token, so that indices and gates ride along.
    """
    values = _leaving(n_tokens * n_heads * row_bytes(width, bytes_per_value), n_ranks)
    slots = n_tokens * n_heads * top_k if reads_token else 0
    gate, index = gate_bytes(bytes_per_value), index_bytes(n_heads, n_experts)
    return Trips(
        values + _leaving(slots * (index + gate), n_ranks),
        values,
        values,
        values + _leaving(slots * gate, n_ranks),
    )


def slot_rows_bytes(rows: float, width: int, bytes_per_value: int, index: int) -> Trips:
    """Expert Parallel with one copy per slot: `rows` of width L leave, each with its `index` bytes;
    the gates stay at home."""
    row = row_bytes(width, bytes_per_value)
    return Trips(rows * (row + index), rows * row, rows * row, rows * row)


def rank_rows_bytes(rows: float, width: int, top_k: int, bytes_per_value: int, index: int) -> Trips:
    """Expert Parallel with one copy per rank: `rows` of width L leave, each with K indices and
    gates."""
    row, gate = row_bytes(width, bytes_per_value), gate_bytes(bytes_per_value)
    return Trips(
        rows * (row + top_k * (index + gate)), rows * row, rows * row, rows * (row + top_k * gate)
    )


def gather_bytes(
    n_sub_tokens: int, width: int, top_k: int, n_ranks: int, bytes_per_value: int, index: int
) -> Trips:
    """Expert Parallel by all-gather and reduce-scatter of N sub-tokens per rank; exact."""
    row, gate = row_bytes(width, bytes_per_value), gate_bytes(bytes_per_value)
    sent = n_sub_tokens * (n_ranks - 1)
    return Trips(
        sent * (row + top_k * (index + gate)), sent * row, sent * row, sent * (row + top_k * gate)
    )


def count_bytes(n_ranks: int) -> int:
    """The exchange of counts before an all-to-all of rows: one int64 to every other rank."""
    return 8 * (n_ranks - 1)


def expected_bytes(
    scheme: Scheme,
    n_sub_tokens: int,
    width: int,
    top_k: int,
    n_ranks: int,
    bytes_per_value: int,
    index: int,
) -> Trips:
    """Expert Parallel under `scheme`, with as many rows as are expected; without the counts."""
    if scheme == "all_gather":
        return gather_bytes(n_sub_tokens, width, top_k, n_ranks, bytes_per_value, index)
    rows = expected_rows(n_sub_tokens, top_k, n_ranks, scheme)
    if scheme == "all_to_all":
        return rank_rows_bytes(rows, width, top_k, bytes_per_value, index)
    return slot_rows_bytes(rows, width, bytes_per_value, index)


def all_reduce_bytes(n_values: float, n_ranks: int, bytes_per_value: int = 4) -> float:
    """A ring all-reduce: every rank sends 2·(P−1)/P of the values."""
    return _leaving(2 * bytes_per_value * n_values, n_ranks)


def scatter_bytes(n_values: float, n_ranks: int, bytes_per_value: int = 4) -> float:
    """A ring reduce-scatter of n values, or an all-gather of n values: (P−1)/P of them."""
    return _leaving(bytes_per_value * n_values, n_ranks)


def _leaving(n: float, n_ranks: int) -> float:
    """n·(P−1)/P; an integer where n is one that P divides."""
    whole = isinstance(n, int) and n % n_ranks == 0
    return n // n_ranks * (n_ranks - 1) if whole else n * (n_ranks - 1) / n_ranks


_NAMES: dict[Scheme, str] = {
    "all_to_all_per_slot": "Expert Parallel",
    "all_to_all": "Expert Parallel, one copy per rank",
    "all_gather": "Expert Parallel, all-gather",
}
_FORMULAS: dict[Scheme, tuple[str, str]] = {
    "all_to_all_per_slot": ("H·K·({}·L·b + i)·(P−1)/P", "H·K·({}·L·b + i)·(P−1)/P"),
    "all_to_all": (
        "H·P·(1−(1−1/P)^K)·({}·L·b + K·(i+2g))·(P−1)/P",
        "H·P·(1−(1−1/P)^K)·({}·L·b + K·(i+g))·(P−1)/P",
    ),
    "all_gather": ("H·({}·L·b + K·(i+2g))·(P−1)", "H·({}·L·b + K·(i+g))·(P−1)"),
}


def traffic(
    model: ModelConfig, n_ranks: int, bytes_per_value: int = 2, training: bool = True
) -> tuple[Item, ...]:
    """Bytes per token and sparse layer of each scheme; not to be added up. Empty without sparse
    layers.

    Head Parallel needs heads: it is there for Multi-Head LatentMoE alone, and works when P divides
    H. Without `training` the two forward exchanges alone.
    """
    s = shape_of(model)
    if not s.n_sparse:
        return ()
    ways = 4 if training else 2
    found = []
    if model.moe.kind == "multi_head_latent":
        token = model.moe.reads_token
        trips = head_bytes(1, s.H, s.L, s.K, s.E, n_ranks, bytes_per_value, reads_token=token)
        slots = f" + H·K·(i+{'2g' if training else 'g'})" if token else ""
        formula = f"({ways}·D_L·b{slots})" if slots else f"{ways}·D_L·b"
        value = trips.total if training else trips.forward
        found.append(Item("Head Parallel", value, f"{formula}·(P−1)/P"))
    for scheme, name in _NAMES.items():
        index = index_bytes(s.H, s.E)
        trips = expected_bytes(scheme, s.H, s.L, s.K, n_ranks, bytes_per_value, index)
        formula = _FORMULAS[scheme][0 if training else 1].format(ways)
        found.append(Item(name, trips.total if training else trips.forward, formula))
    return tuple(found)
