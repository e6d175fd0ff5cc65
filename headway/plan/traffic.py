"""Bytes that one rank sends for a sparse layer, from plain integers, for Head and Expert Parallel.

T tokens of the rank · H heads · L width of a head (D_L = H·L) · E experts per head · K chosen ·
N sub-tokens of the rank (T·H, also after heads were exchanged) · P ranks of the axis · b bytes of a
value (1 float8, 2 bfloat16, 4 float32, 8 float64) · g bytes of a gate (4; 8 where b is 8) · i bytes
of an index (2 where H·E < 32768, else 4). What a rank keeps for itself is not counted.

| scheme | dispatch | combine | backward of combine | backward of dispatch |
|---|---|---|---|---|
| Head Parallel | T·D_L·b·(P−1)/P | the same | the same | the same |
| … router on the token | + T·H·K·(i+g)·(P−1)/P | | | + T·H·K·g·(P−1)/P |
| Expert Parallel, one copy per slot, R rows | R·(L·b + i) | R·L·b | R·L·b | R·L·b |
| … one copy per rank, R rows | R·(L·b + K·(i+g)) | R·L·b | R·L·b | R·(L·b + K·g) |
| … all-gather | N·(L·b + K·(i+g))·(P−1) | N·L·b·(P−1) | the same | N·(L·b + K·g)·(P−1) |

The R rows (permuted tokens) that a rank sends depend on the router: N·K·(P−1)/P with a copy per
slot and even choices, and N·c·(P−1)/P with a copy per rank, where c = P·(1 − (1 − 1/P)^K) is the
expected number of ranks among K independent choices; an exchange of their counts, 8·(P−1) bytes,
comes first. The sizes of the other schemes are fixed in advance. DeepEP sends one copy per rank. A
sub-token in float8 is sent with its float32 scale: L + 4 bytes in place of L·b.
"""

from enum import Enum
from typing import Literal, NamedTuple

from headway.config import MeshConfig, ModelConfig
from headway.plan.shape import Item, shape_of

Scheme = Literal["all_to_all", "all_to_all_per_slot", "all_gather"]
"""How sub-tokens are dispatched on the `ep` axis: one copy per rank, one copy per slot, or all
sub-tokens to all ranks."""

SCHEMES: tuple[Scheme, ...] = ("all_to_all", "all_to_all_per_slot", "all_gather")


class ExchangeBytes(NamedTuple):
    """Bytes that one rank sends in each of the four exchanges of a layer. Integers for integer
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
    """Return i, the bytes of an index among H·E experts."""
    return 2 if n_heads * n_experts < 32768 else 4


def payload_bytes(mesh: MeshConfig, bytes_per_value: int) -> int:
    """Return b of sub-tokens as they are sent, where the matmuls have `bytes_per_value`."""
    return 1 if mesh.payload == "float8" else bytes_per_value


def row_bytes(width: int, bytes_per_value: int) -> int:
    """Return the bytes of a sub-token: L·b, and 4 for its scale where b is 1
    (`mesh.payload=float8`)."""
    return width * bytes_per_value + (4 if bytes_per_value == 1 else 0)


def gate_bytes(bytes_per_value: int) -> int:
    """Return g: gates are float32, and float64 where everything is."""
    return 8 if bytes_per_value == 8 else 4


def expected_ranks(top_k: int, n_ranks: int) -> float:
    """Return c, the expected number of distinct ranks among K independent, even choices of P."""
    return n_ranks * (1 - (1 - 1 / n_ranks) ** top_k)


def expected_rows(n_sub_tokens: float, top_k: int, n_ranks: int, scheme: Scheme) -> float:
    """Return R, the rows that a rank is expected to send under an all-to-all scheme."""
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
) -> ExchangeBytes:
    """Return the bytes of Head Parallel, T tokens of H heads of width L over P ranks; exact when P
    divides H.

    `reads_token`: the router reads the whole token, so that indices and gates are sent too.
    """
    values = _sent(n_tokens * n_heads * row_bytes(width, bytes_per_value), n_ranks)
    slots = n_tokens * n_heads * top_k if reads_token else 0
    gate, index = gate_bytes(bytes_per_value), index_bytes(n_heads, n_experts)
    return ExchangeBytes(
        values + _sent(slots * (index + gate), n_ranks),
        values,
        values,
        values + _sent(slots * gate, n_ranks),
    )


def slot_rows_bytes(rows: float, width: int, bytes_per_value: int, index: int) -> ExchangeBytes:
    """Return the bytes of Expert Parallel with one copy per slot: `rows` of width L are sent, each
    with its `index` bytes; gates stay local."""
    row = row_bytes(width, bytes_per_value)
    return ExchangeBytes(rows * (row + index), rows * row, rows * row, rows * row)


def rank_rows_bytes(
    rows: float, width: int, top_k: int, bytes_per_value: int, index: int
) -> ExchangeBytes:
    """Return the bytes of Expert Parallel with one copy per rank: `rows` of width L are sent, each
    with K indices and gates."""
    row, gate = row_bytes(width, bytes_per_value), gate_bytes(bytes_per_value)
    return ExchangeBytes(
        rows * (row + top_k * (index + gate)), rows * row, rows * row, rows * (row + top_k * gate)
    )


def gather_bytes(
    n_sub_tokens: int, width: int, top_k: int, n_ranks: int, bytes_per_value: int, index: int
) -> ExchangeBytes:
    """Return the bytes of Expert Parallel by all-gather and reduce-scatter of N sub-tokens per
    rank; exact."""
    row, gate = row_bytes(width, bytes_per_value), gate_bytes(bytes_per_value)
    sent = n_sub_tokens * (n_ranks - 1)
    return ExchangeBytes(
        sent * (row + top_k * (index + gate)), sent * row, sent * row, sent * (row + top_k * gate)
    )


def count_bytes(n_ranks: int) -> int:
    """Return the bytes of the exchange of counts before an all-to-all of rows: one int64 to every
    other rank."""
    return 8 * (n_ranks - 1)


def expected_bytes(
    scheme: Scheme,
    n_sub_tokens: int,
    width: int,
    top_k: int,
    n_ranks: int,
    bytes_per_value: int,
    index: int,
) -> ExchangeBytes:
    """Return the expected bytes of Expert Parallel under `scheme`, without the counts."""
    if scheme == "all_gather":
        return gather_bytes(n_sub_tokens, width, top_k, n_ranks, bytes_per_value, index)
    rows = expected_rows(n_sub_tokens, top_k, n_ranks, scheme)
    if scheme == "all_to_all":
        return rank_rows_bytes(rows, width, top_k, bytes_per_value, index)
    return slot_rows_bytes(rows, width, bytes_per_value, index)


def all_reduce_bytes(n_values: float, n_ranks: int, bytes_per_value: int = 4) -> float:
    """Return the bytes of a ring all-reduce: every rank sends 2·(P−1)/P of the values."""
    return _sent(2 * bytes_per_value * n_values, n_ranks)


def scatter_bytes(n_values: float, n_ranks: int, bytes_per_value: int = 4) -> float:
    """Return the bytes of a ring reduce-scatter or all-gather of n values: (P−1)/P of them."""
    return _sent(bytes_per_value * n_values, n_ranks)


def _sent(n: float, n_ranks: int) -> float:
    """Return n·(P−1)/P; an integer where n is an integer that P divides."""
    exact = isinstance(n, int) and n % n_ranks == 0
    return n // n_ranks * (n_ranks - 1) if exact else n * (n_ranks - 1) / n_ranks


class TokenExchange(Enum):
    """A way to exchange the tokens of a sparse layer."""

    HEADS = "Head Parallel"
    PER_SLOT = "Expert Parallel"
    PER_RANK = "Expert Parallel, one copy per rank"
    ALL_GATHER = "Expert Parallel, all-gather"


_EXCHANGES: dict[Scheme, TokenExchange] = {
    "all_to_all_per_slot": TokenExchange.PER_SLOT,
    "all_to_all": TokenExchange.PER_RANK,
    "all_gather": TokenExchange.ALL_GATHER,
}
_FORMULAS: dict[Scheme, tuple[str, str]] = {
    "all_to_all_per_slot": ("H·K·({}·L·b + i)·(P−1)/P", "H·K·({}·L·b + i)·(P−1)/P"),
    "all_to_all": (
        "H·P·(1−(1−1/P)^K)·({}·L·b + K·(i+2g))·(P−1)/P",
        "H·P·(1−(1−1/P)^K)·({}·L·b + K·(i+g))·(P−1)/P",
    ),
    "all_gather": ("H·({}·L·b + K·(i+2g))·(P−1)", "H·({}·L·b + K·(i+g))·(P−1)"),
}


def traffic_per_token(
    model: ModelConfig, n_ranks: int, bytes_per_value: int = 2, training: bool = True
) -> tuple[Item, ...]:
    """Return the bytes per token and sparse layer of each scheme, which are alternatives; empty
    without sparse layers.

    Head Parallel needs heads: it is listed for Multi-Head LatentMoE only, and works when P divides
    H. Without `training` only the two forward exchanges are counted.
    """
    s = shape_of(model)
    if not s.n_sparse:
        return ()
    ways = 4 if training else 2
    items = []
    if model.moe.kind == "multi_head_latent":
        token = model.moe.reads_token
        exchange = head_bytes(1, s.H, s.L, s.K, s.E, n_ranks, bytes_per_value, reads_token=token)
        slots = f" + H·K·(i+{'2g' if training else 'g'})" if token else ""
        formula = f"({ways}·D_L·b{slots})" if slots else f"{ways}·D_L·b"
        value = exchange.total if training else exchange.forward
        items.append(Item(TokenExchange.HEADS, value, f"{formula}·(P−1)/P"))
    for scheme, part in _EXCHANGES.items():
        index = index_bytes(s.H, s.E)
        exchange = expected_bytes(scheme, s.H, s.L, s.K, n_ranks, bytes_per_value, index)
        formula = _FORMULAS[scheme][0 if training else 1].format(ways)
        items.append(Item(part, exchange.total if training else exchange.forward, formula))
    return tuple(items)
