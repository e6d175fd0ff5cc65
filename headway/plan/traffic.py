"""Bytes that one rank sends for a sparse layer, for Head and Expert Parallel.

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
sub-token in float8 is sent with its float32 scale: L + 4 bytes in place of L·b."""

from enum import Enum
from typing import Literal, NamedTuple

from headway.config import MeshConfig, ModelConfig
from headway.plan.cost import Item

Scheme = Literal["all_to_all", "all_to_all_per_slot", "all_gather"]
"""How sub-tokens are dispatched on the `ep` axis: one copy per rank, one copy per slot, or all
sub-tokens to all ranks."""


class TokenExchange(Enum):
    """A way to exchange the tokens of a sparse layer."""

    HEADS = "Head Parallel"
    PER_SLOT = "Expert Parallel"
    PER_RANK = "Expert Parallel, one copy per rank"
    ALL_GATHER = "Expert Parallel, all-gather"

    @property
    def follows_router(self) -> bool:
        """Whether the router decides how many rows a rank sends, so that counts come first."""
        return self in (TokenExchange.PER_SLOT, TokenExchange.PER_RANK)


SCHEMES: dict[Scheme, TokenExchange] = {
    "all_to_all": TokenExchange.PER_RANK,
    "all_to_all_per_slot": TokenExchange.PER_SLOT,
    "all_gather": TokenExchange.ALL_GATHER,
}
_FORMULAS = {
    TokenExchange.HEADS: "4·H·L·b·(P−1)/P",
    TokenExchange.PER_SLOT: "H·K·(4·L·b + i)·(P−1)/P",
    TokenExchange.PER_RANK: "H·c·(4·L·b + K·(i+2g))·(P−1)/P, c = P·(1−(1−1/P)^K)",
    TokenExchange.ALL_GATHER: "H·(4·L·b + K·(i+2g))·(P−1)",
}
"""Bytes per token in all four exchanges of a layer."""


class ExchangeBytes(NamedTuple):
    """Bytes that one rank sends in each of the four exchanges of a layer. Integers for integer
    arguments, where the sizes divide."""

    dispatch: float
    combine: float
    combine_backward: float
    dispatch_backward: float

    @property
    def total(self) -> float:
        return sum(self)


class SubToken(NamedTuple):
    """How a sub-token is sent."""

    copies: float
    """Expected copies; the sender is itself the receiver of 1/P of them."""
    row: int
    """Bytes of the values of a copy, L·b, and 4 for its scale where b is 1
    (`mesh.payload=float8`)."""
    indices: int
    """Bytes of the indices of a copy."""
    gates: int
    """Bytes of the gates of a copy."""

    def sent(self, rows: float) -> ExchangeBytes:
        """Return the bytes of `rows` copies; indices have no gradient."""
        there, back = self.row + self.indices + self.gates, self.row + self.gates
        return ExchangeBytes(rows * there, rows * self.row, rows * self.row, rows * back)


def sub_token(
    model: ModelConfig, exchange: TokenExchange, n_ranks: int, bytes_per_value: int
) -> SubToken:
    """Return how a sub-token is sent over P ranks, `bytes_per_value` on the wire."""
    moe, K, b = model.moe, model.moe.top_k, bytes_per_value
    row = moe.head_width(model.d_model) * b + (4 if b == 1 else 0)
    index, gate = 2 if moe.n_heads * moe.n_experts < 32768 else 4, 8 if b == 8 else 4
    match exchange:
        case TokenExchange.HEADS:
            K = K if moe.reads_token else 0  # the router of a sub-token runs after the exchange
            return SubToken(1, row, K * index, K * gate)
        case TokenExchange.PER_SLOT:  # gates stay local
            return SubToken(K, row, index, 0)
        case TokenExchange.PER_RANK:
            return SubToken(expected_ranks(K, n_ranks), row, K * index, K * gate)
        case TokenExchange.ALL_GATHER:
            return SubToken(n_ranks, row, K * index, K * gate)


def expected_ranks(top_k: int, n_ranks: int) -> float:
    """Return c, the expected number of distinct ranks among K independent, even choices of P."""
    return n_ranks * (1 - (1 - 1 / n_ranks) ** top_k)


def expected_bytes(
    model: ModelConfig, exchange: TokenExchange, n_tokens: int, n_ranks: int, bytes_per_value: int
) -> ExchangeBytes:
    """Return the bytes that a rank is expected to send of its T tokens in one layer, without the
    counts; exact for an all-gather, and for Head Parallel where P divides H."""
    sub = sub_token(model, exchange, n_ranks, bytes_per_value)
    return sub.sent(_sent(n_tokens * model.moe.n_heads * sub.copies, n_ranks))


def formula(
    model: ModelConfig, exchange: TokenExchange, axis: str = "P", bytes_per_value: int = 2
) -> str:
    """Return the formula of `expected_bytes(…).total` per token on an axis of `axis` ranks."""
    text = _FORMULAS[exchange]
    if exchange is TokenExchange.HEADS and model.moe.reads_token:
        text = "H·(4·L·b + K·(i+2g))·(P−1)/P"
    return text.replace("P", axis).replace("L·b", "(L+4)" if bytes_per_value == 1 else "L·b")


def payload_bytes(mesh: MeshConfig, bytes_per_value: int) -> int:
    """Return b of sub-tokens as they are sent, where the matmuls have `bytes_per_value`."""
    return 1 if mesh.payload == "float8" else bytes_per_value


def count_bytes(n_ranks: int) -> int:
    """Return the bytes of the exchange of counts before an all-to-all of rows: one int64 to every
    other rank."""
    return 8 * (n_ranks - 1)


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


def traffic_per_token(
    model: ModelConfig, n_ranks: int, bytes_per_value: int = 2
) -> tuple[Item, ...]:
    """Return the bytes per token and sparse layer in training under each scheme, which are
    alternatives; empty without sparse layers.

    Head Parallel needs heads: it is listed for Multi-Head LatentMoE only, and works when P divides
    H."""
    exchanges = list(TokenExchange) if model.n_sparse else []
    if exchanges and model.moe.kind != "multi_head_latent":
        exchanges.remove(TokenExchange.HEADS)
    return tuple(
        Item(e, expected_bytes(model, e, 1, n_ranks, bytes_per_value).total, formula(model, e))
        for e in exchanges
    )
