// Weights packed once, when a model is loaded for inference, in the layout that the register tile reads.
//
// A matrix with K rows (summed over) and `cols` columns becomes panels of NR·VL columns, the last one
// narrower; a panel is [units][columns], contiguous. So a product with one row reads every weight once and
// in the order of memory. Columns are padded to VL with zeros.
//
//     C[i, j] = Σ_u A[i, u] · B[u, j]      u in order, in one float32 accumulator
//
// whatever the number of rows: the sums of a block of units go on where those of the last one stopped, so
// that the result of a row depends on nothing but the row (and equals `product` of tile.h bit for bit).
//
// W is what a unit of a column is stored as: `Unit`, or, of bfloat16 weights for products in float32, `bf16`,
// half of the bytes: the same sums, bit for bit.
#pragma once
#include "tile.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace headway {

constexpr long PANEL = NR * VL;
constexpr long UNITS = 64;  // of a panel that stay in the first-level cache while many rows pass: 16 KiB

// Columns of panel p, padded.
constexpr long panel_width(long cols, long p) {
  return cols - p * PANEL < PANEL ? pad(cols - p * PANEL, VL) : PANEL;
}
constexpr long panels_of(long cols) { return (cols + PANEL - 1) / PANEL; }

// Asks for pages of 2 MiB under weights that will be written for the first time: a stream through them then
// waits less for addresses (7% of the time of 50 experts).
static void large_pages(void* weights, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, from = ((uintptr_t)weights + page - 1) / page * page;
  const uintptr_t to = ((uintptr_t)weights + bytes) / page * page;
  if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// C [M, PANEL] = A·B over some units; goes on with the sums in C where `more`. Asks on its way for the memory
// from `next` on, `step` bytes per unit, which the processor would not yet read ahead by itself; null is none.
template <class T, int M, int N, class W>
static __attribute__((noinline)) void strip(long units, const Unit* a, long a_row, const W* b, float* c, bool more,
                                            const char* next, long step) {
  constexpr int LINES = M < MR ? (N * VL * sizeof(W) + 63) / 64 : 2;
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = more ? load(c + i * PANEL + j * VL) : Vec{};
  const auto unit = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = dot<T>(acc[i][j], a[i * a_row], b + j * VL);
  };
  if (next)
    for (long u = 0; u < units; ++u, ++a, b += N * VL, next += step) {
#pragma GCC unroll 4
      for (int l = 0; l < LINES; ++l) __builtin_prefetch(next + l * 64);
      unit();
    }
  else
    for (long u = 0; u < units; ++u, ++a, b += N * VL) unit();
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c + i * PANEL + j * VL, acc[i][j]);
}

// All rows against some units of a panel; asks meanwhile for as much memory from `next` on, in parts if there
// is more than one strip.
template <class T, int N, class W>
static void strips(long rows, long units, const Unit* a, long a_row, const W* b, float* c, bool more,
                   const char* next) {
  constexpr long line = N * VL * sizeof(W);
  const char* end = next + units * line;
  long step = next ? (rows < MR ? line : line / 2) : 0;
  for (; rows >= MR; rows -= MR, a += MR * a_row, c += MR * PANEL) {
    strip<T, MR, N>(units, a, a_row, b, c, more, next, step);
    if (next && (next += units * step) >= end) next = nullptr;
  }
#define HEADWAY_ROWS(n) \
  case n: strip<T, n, N>(units, a, a_row, b, c, more, next, step); break;
  switch (rows) { HEADWAY_ROWS(1) HEADWAY_ROWS(2) HEADWAY_ROWS(3) HEADWAY_ROWS(4) HEADWAY_ROWS(5) }
#undef HEADWAY_ROWS
}

// C [rows, PANEL] = A [rows, units] · one panel of `width` columns. `next`: what will be read after it; null is
// what lies behind it, which one row need not ask for.
template <class T, class W>
static void panel_product(long rows, long units, const Unit* a, long a_row, const W* b, long width, float* c,
                          const W* next = nullptr) {
  const long block = rows > MR ? UNITS : units;
  for (long u = 0; u < units; u += block) {
    const long n = units - u < block ? units - u : block;
    const Unit* a_at = a + u;
    const W* b_at = b + u * width;
    const char* then = (const char*)(next ? next + u * width : rows > 1 ? b_at + n * width : nullptr);
    switch (width / VL) {
      case 1: strips<T, 1>(rows, n, a_at, a_row, b_at, c, u > 0, then); break;
      case 2: strips<T, 2>(rows, n, a_at, a_row, b_at, c, u > 0, then); break;
#ifdef __AVX512F__
      case 3: strips<T, 3>(rows, n, a_at, a_row, b_at, c, u > 0, then); break;
      default: strips<T, NR>(rows, n, a_at, a_row, b_at, c, u > 0, then);
#endif
    }
  }
}

// Floats that are bfloat16 values, as in panels of such weights.
static void halve(const Unit* from, long n, bf16* to) {
  for (long i = 0; i < n; ++i) to[i].bits = (uint16_t)(from[i] >> 16);
}

}  // namespace headway
