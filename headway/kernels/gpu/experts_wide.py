"""The kernels of wide experts: one product a kernel, hidden units go through memory; equations in
../experts.py.

    forward    wide_hidden     hid_RF = act(x[token]·W_inᵀ)
               wide_rows       y[slot] = gate · hid·W_out
    backward   wide_gradients  z = do[token]·W_outᵀ, then d_gate, gate·hid, d_pre_R
               wide_rows       dx[slot] = d_pre·W_in
               wide_weights    dW_in = d_preᵀ·x,  dW_out = (gate·hid)ᵀ·do

Rows lie in sorted order, an expert's one behind the other. Every kernel is a matmul over tiles
whose sums stay in registers, with the elementwise work before the store, so that products, loads
and stores of different programs overlap; the narrow kernels, which keep everything on the chip, run
their products one after the other. A row of R costs 2·F bytes in forward and 2·(G + 1)·F in
backward, only while the operator runs.

M rows of a tile · BF hidden units · BN columns · BK summed at a time. Shapes of the parameters are
those of experts_forward.py, and `hid` [R, F] · `pre`, `d_pre` [R, G·F].

How the rows of experts a, b, c (5, 0 and 3 rows) become blocks of M = 4, one program each per tile
of columns; the grid's bound ⌈8/4⌉ + 3 is known before the data:

    rows    a a a a | a | c c c |        start_G [0, 5, 5, 8]
    blocks     0      1     2     3 4    group_B [0, 0, 2, −1, −1]   row_B [0, 4, 5, …]"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels import gpu
from headway.kernels.gpu.arith import dot, narrow, widen
from headway.kernels.gpu.blocks import Blocks, blocks
from headway.kernels.gpu.experts_backward import paired, slopes
from headway.kernels.gpu.experts_forward import activated, hidden_rows, unpaired
from headway.kernels.gpu.slots import cast, empty_rows, padded, put_rows, sum_slots
from headway.kernels.gpu.tune import Tiles, tiles
from headway.kernels.paths import ExpertInputs

BFLOAT16 = {
    "hidden": Tiles(128, 64, 8, 3),
    "rows": Tiles(128, 128, 8, 3),
    "gradients": Tiles(128, 64, 8, 3),
    "weights": Tiles(128, 128, 4, 3),
}
"""`rows × cols` of a kernel's sums: M × BF, M × BN, M × BF, BD × BN. Near the fastest on an H100 at
L 128 and 256."""

AMPERE = BFLOAT16 | {"gradients": Tiles(64, 32, 4, 3), "weights": Tiles(128, 128, 8, 3)}
"""Where a block has 163 KiB of shared memory (capability 8.0, 8.7)."""

SMALL = {name: Tiles(64, 64, 4, 2) for name in BFLOAT16} | {"gradients": Tiles(64, 32, 4, 2)}
"""Where a block has less than 163 KiB of shared memory (capability 8.6, 8.9, 12.0), and float32."""


@triton.jit
def add(a, b, acc):
    """Return acc + a·b; float32 gets a fresh sum each time: tensor cores add by truncation."""
    if a.dtype == tl.float32:
        return acc + dot(a, b)
    return dot(a, b, acc)


@triton.jit
def tile(at, first, k, inside, K: tl.constexpr, BK: tl.constexpr):
    """Load `at [n, BK]` advanced by `first` along K; zeros outside."""
    if K % BK == 0:
        return tl.load(at + first, mask=inside[:, None], other=0.0)
    return tl.load(at + first, mask=inside[:, None] & (first + k < K)[None, :], other=0.0)


@triton.jit
def block_rows(b, slots, start, group, first_row, M: tl.constexpr):
    """Return expert, rows, slots of a block, and which rows exist. Past the last block the expert
    is −1, and no row is before `start[0]`."""
    g = tl.load(group + b)
    row = tl.load(first_row + b) + tl.arange(0, M)
    valid = row < tl.load(start + g + 1)
    slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
    return g, row.to(tl.int64), slot, valid


@triton.jit
def wide_hidden(
    x, w_in, slots, start, group, first_row, hid, pre, K,
    G: tl.constexpr, F: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr, M: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the hidden units of a block of rows and, with KEEP, store their pre-activations."""
    chunks: tl.constexpr = (F + BF - 1) // BF
    b = tl.program_id(0) // chunks
    g, row, slot, valid = block_rows(b, slots, start, group, first_row, M)
    if g < 0:
        return
    f0 = tl.program_id(0) % chunks * BF
    k = tl.arange(0, BK)
    row_in, live_in = hidden_rows(f0, F, G, BF)
    x_at = x + (slot // K).to(tl.int64)[:, None] * L + k[None, :]
    w_at = w_in + g.to(tl.int64) * (G * F * L) + row_in[:, None] * L + k[None, :]
    acc = tl.zeros([M, G * BF], tl.float32)
    for l0 in range(0, L, BK):
        w = tile(w_at, l0, k, live_in, L, BK)
        acc = add(tile(x_at, l0, k, valid, L, BK), w.T, acc)
    first, up = unpaired(acc, G, M, BF)
    f = f0 + tl.arange(0, BF)
    inside = valid[:, None] & (f < F)[None, :]
    units = narrow(activated(first, up, ACTIVATION), hid.dtype.element_ty)
    tl.store(hid + row[:, None] * F + f[None, :], units, mask=inside)
    if KEEP:
        at = pre + row[:, None] * (G * F) + row_in[None, :]
        inside = valid[:, None] & live_in[None, :]
        tl.store(at, narrow(acc, pre.dtype.element_ty), mask=inside)


@triton.jit
def wide_rows(
    a, w, gate, slots, start, group, first_row, y, scale,
    D: tl.constexpr, L: tl.constexpr, GATED: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute y·scale at the slots of a block of rows, some columns: (gate ·) a [R, D]·w [D, L]."""
    columns: tl.constexpr = (L + BN - 1) // BN
    b = tl.program_id(0) // columns
    g, row, slot, valid = block_rows(b, slots, start, group, first_row, M)
    if g < 0:
        return
    column = tl.program_id(0) % columns
    cols, k = column * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_at = a + row[:, None] * D + k[None, :]
    w_at = w + g.to(tl.int64) * (D * L) + k[:, None] * L + cols[None, :]
    acc = tl.zeros([M, BN], tl.float32)
    for d0 in range(0, D, BK):
        a_tile = tile(a_at, d0, k, valid, D, BK)
        if D % BK == 0 and L % BN == 0:
            w_tile = tl.load(w_at + d0 * L)
        else:
            inside = (d0 + k < D)[:, None] & (cols < L)[None, :]
            w_tile = tl.load(w_at + d0 * L, mask=inside, other=0.0)
        acc = add(a_tile, w_tile, acc)
    factor = tl.full([M], 1.0, tl.float32)
    if GATED:
        factor = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)
    put_rows(y, scale, slot, valid, cols, acc, factor, L, columns, column)


@triton.jit
def wide_gradients(
    d_out, x, gate, w_in, w_out, slots, start, group, first_row, pre, hid, d_pre, d_gate, K, S,
    G: tl.constexpr, F: tl.constexpr, L: tl.constexpr, ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr, M: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute, for a block of rows and BF hidden units, gate·hid, d_pre and their part of the
    gates' gradient, `d_gate [⌈F/BF⌉, S]` over S slots. KEPT: pre-activations are read."""
    chunks: tl.constexpr = (F + BF - 1) // BF
    b = tl.program_id(0) // chunks
    g, row, slot, valid = block_rows(b, slots, start, group, first_row, M)
    if g < 0:
        return
    chunk = tl.program_id(0) % chunks
    k = tl.arange(0, BK)
    row_in, live_in = hidden_rows(chunk * BF, F, G, BF)
    f = chunk * BF + tl.arange(0, BF)
    token = (slot // K).to(tl.int64)
    x_at = x + token[:, None] * L + k[None, :]
    do_at = d_out + token[:, None] * L + k[None, :]
    w_at = w_in + g.to(tl.int64) * (G * F * L) + row_in[:, None] * L + k[None, :]
    back_at = w_out + g.to(tl.int64) * (F * L) + f[:, None] * L + k[None, :]
    acc = tl.zeros([M, G * BF], tl.float32)
    z = tl.zeros([M, BF], tl.float32)
    for l0 in range(0, L, BK):
        if not KEPT:
            w = tile(w_at, l0, k, live_in, L, BK)
            acc = add(tile(x_at, l0, k, valid, L, BK), w.T, acc)
        w_back = tile(back_at, l0, k, f < F, L, BK)
        z = add(tile(do_at, l0, k, valid, L, BK), w_back.T, z)
    at, both = row[:, None] * (G * F) + row_in[None, :], valid[:, None] & live_in[None, :]
    if KEPT:
        acc = widen(tl.load(pre + at, mask=both, other=0.0))
    first, up = unpaired(acc, G, M, BF)
    units, d_first, d_up = slopes(first, up, ACTIVATION)
    inside = valid[:, None] & (f < F)[None, :]
    part = tl.sum(tl.where(inside, units * z, 0.0), 1)
    tl.store(d_gate + chunk.to(tl.int64) * S + slot, part, mask=valid)
    gates = tl.load(gate + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
    units = narrow(gates * units, hid.dtype.element_ty)
    tl.store(hid + row[:, None] * F + f[None, :], units, mask=inside)
    z *= gates
    slope = paired(z * d_first, z * d_up, G, M, BF)
    tl.store(d_pre + at, narrow(slope, d_pre.dtype.element_ty), mask=both)


@triton.jit
def wide_weights(
    a, x, slots, start, dw, K,
    D: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of one expert's `dw [D, L]` = Σ a[row]ᵀ·x[token of the row] over its rows in
    their order; zeros where it has none."""
    columns: tl.constexpr = (L + BN - 1) // BN
    tiles: tl.constexpr = (D + BD - 1) // BD * columns
    g, place = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    d = place // columns * BD + tl.arange(0, BD)
    cols = place % columns * BN + tl.arange(0, BN)
    end = tl.load(start + g + 1)
    acc = tl.zeros([BD, BN], tl.float32)
    for r0 in range(tl.load(start + g), end, BK):
        row = r0 + tl.arange(0, BK)
        valid = row < end
        slot = tl.load(slots + row, mask=valid, other=0).to(tl.int32)
        a_tile = tl.load(
            a + row.to(tl.int64)[:, None] * D + d[None, :],
            mask=valid[:, None] & (d < D)[None, :],
            other=0.0,
        )
        x_tile = tl.load(
            x + (slot // K).to(tl.int64)[:, None] * L + cols[None, :],
            mask=valid[:, None] & (cols < L)[None, :],
            other=0.0,
        )
        acc = add(a_tile.T, x_tile, acc)
    at = dw + g.to(tl.int64) * (D * L) + d[:, None] * L + cols[None, :]
    inside = (d < D)[:, None] & (cols < L)[None, :]
    tl.store(at, narrow(acc, dw.dtype.element_ty), mask=inside)


def tile_of(kernel: str, L: int, G: int, F: int, itemsize: int) -> Tiles:
    """Return the tiles of one kernel of this file for a shape."""
    match gpu.capability():
        case 86 | 89 | 120 | 121:
            table = SMALL
        case 80 | 87:
            table = AMPERE
        case _:
            table = BFLOAT16
    default = (SMALL if itemsize == 4 else table)[kernel]
    return tiles(f"experts_wide_{kernel}", (L, G, F, itemsize), default)


class _Call:
    """The tables of one call, and how its kernels are launched."""

    def __init__(
        self, x_NL: Tensor, slot_R: Tensor, row_NK: Tensor, counts_HE: Tensor, sizes: tuple
    ):
        self.x, self.slot_R, self.row_NK, self.counts_HE = x_NL, slot_R, row_NK, counts_HE
        self.G, self.F, self.L = sizes
        self.K, self.depth = row_NK.shape[1], 64 if x_NL.element_size() == 2 else 32
        self.tables: dict[int, Blocks] = {}

    def cut(self, kernel: str) -> Tiles:
        return tile_of(kernel, self.L, self.G, self.F, self.x.element_size())

    def blocks(self, M: int) -> Blocks:
        """Return the blocks of M rows; computed once for kernels of the same M."""
        if M not in self.tables:
            self.tables[M] = blocks(self.counts_HE, self.slot_R.numel(), M)
        return self.tables[M]

    def start_G(self) -> Tensor:
        return next(iter(self.tables.values())).start_G

    def rows(self, a: Tensor, w: Tensor, gate: Tensor | None) -> Tensor:
        """Return Σ_k (gate ·) a·w over the slots of every sub-token; `[N, L]`."""
        cut, (N, K) = self.cut("rows"), self.row_NK.shape
        BN = min(cut.cols, padded(self.L))
        columns, table = triton.cdiv(self.L, BN), self.blocks(cut.rows)
        y_NKL, scale = empty_rows(self.x, N, K, columns)
        wide_rows[(table.group_B.numel() * columns,)](
            a=a, w=w, gate=a if gate is None else gate, slots=self.slot_R, **table.arguments(),
            y=y_NKL, scale=scale, D=a.shape[1], L=self.L, GATED=gate is not None,
            M=cut.rows, BN=BN, BK=self.depth, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        return sum_slots(self.x, y_NKL, scale, self.row_NK, table.start_G, BN)

    def weights(self, a: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """Return a gradient in the shape of `like`."""
        cut, D = self.cut("weights"), a.shape[1]
        BD, BN = min(cut.rows, padded(D)), min(cut.cols, padded(self.L))
        dw = torch.empty_like(like, memory_format=torch.contiguous_format)
        programs = self.counts_HE.numel() * triton.cdiv(D, BD) * triton.cdiv(self.L, BN)
        wide_weights[(programs,)](
            a=a, x=x, slots=self.slot_R, start=self.start_G(), dw=dw, K=self.K, D=D, L=self.L,
            BD=BD, BN=BN, BK=self.depth, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        return dw


def forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (out `[N, L]`, pre-activations of sorted rows `[R, G·F]`, empty unless `keep`)."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation = inputs
    x, gate = x_NL.contiguous(), gate_NK.contiguous()
    w_in, w_out = cast(w_in_HEGFL, x), cast(w_out_HEFL, x)
    (_, _, G, F, L), R = w_in.shape, slot_R.numel()
    call = _Call(x, slot_R, row_NK, counts_HE, (G, F, L))
    hid, pre = x.new_empty(R, F), x.new_empty(R if keep else 0, G * F)
    cut = call.cut("hidden")
    table, BF = call.blocks(cut.rows), min(cut.cols, padded(F))
    wide_hidden[(table.group_B.numel() * triton.cdiv(F, BF),)](
        x=x, w_in=w_in, slots=slot_R, **table.arguments(), hid=hid, pre=pre, K=call.K,
        G=G, F=F, L=L, ACTIVATION=activation, KEEP=keep, M=cut.rows, BF=BF, BK=call.depth,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return call.rows(hid, w_out, gate), pre


def backward(
    do_NL: Tensor, inputs: ExpertInputs, pre_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in, w_out. An empty `pre_R` is recomputed."""
    x_NL, gate_NK, w_in_HEGFL, w_out_HEFL, slot_R, row_NK, counts_HE, activation = inputs
    x, gate = x_NL.contiguous(), gate_NK.contiguous()
    w_in, w_out = cast(w_in_HEGFL, x), cast(w_out_HEFL, x)
    (_, _, G, F, L), R, S = w_in.shape, slot_R.numel(), gate.numel()
    call = _Call(x, slot_R, row_NK, counts_HE, (G, F, L))
    hid, d_pre = x.new_empty(R, F), x.new_empty(R, G * F)
    cut = call.cut("gradients")
    table, BF = call.blocks(cut.rows), min(cut.cols, padded(F))
    chunks = triton.cdiv(F, BF)
    # of slots without an expert it stays 0
    d_gate = gate.new_zeros(chunks, *gate.shape, dtype=torch.float32)
    wide_gradients[(table.group_B.numel() * chunks,)](
        d_out=do_NL, x=x, gate=gate, w_in=w_in, w_out=w_out, slots=slot_R, **table.arguments(),
        pre=pre_R, hid=hid, d_pre=d_pre, d_gate=d_gate, K=call.K, S=S, G=G, F=F, L=L,
        ACTIVATION=activation, KEPT=len(pre_R) > 0, M=cut.rows, BF=BF, BK=call.depth,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    dx = call.rows(d_pre, w_in, None)
    dw_in, dw_out = call.weights(d_pre, x, w_in_HEGFL), call.weights(hid, do_NL, w_out_HEFL)
    return dx, d_gate.sum(0).to(gate.dtype), dw_in, dw_out
