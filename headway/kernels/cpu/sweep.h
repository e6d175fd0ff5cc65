// Loops over rows and over the vectors of a row, the last of which may end early.
#pragma once
#include "tile.h"

namespace headway {

constexpr long SMALL = 16384;  // elements below which waking threads costs more than the work

// f(i, n) for vectors of n ≤ VL elements from i.
template <class F>
static INLINE void sweep(long size, F f) {
  long i = 0;
  for (; i + VL <= size; i += VL) f(i, VL);
  if (i < size) f(i, size - i);
}
#define EACH [&](long i, long n) __attribute__((always_inline))

// Halves added to halves: shorter than one after the other, which short rows would wait for.
static INLINE float total(Vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[VL];
  store(s, v);
  for (int half = VL / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
#endif
}

// row(r) for every row
template <class F>
static void over_rows(long rows, long row_size, int threads, F row) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * row_size > SMALL)
  for (long r = 0; r < rows; ++r) row(r);
}

static INLINE Vec square_root(Vec v) {
#ifdef __AVX512F__
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < VL; ++i) v[i] = sqrtf(v[i]);
  return v;
#endif
}

}  // namespace headway
