// Loops over rows and over the vectors of a row, the last of which may end early.
#pragma once
#include "tile.h"

namespace headway {

constexpr long SMALL = 16384;  // elements below which waking threads costs more than the work

// The first n of VL elements, then zeros.
template <class T>
static INLINE Vec get(const T* p, long n) {
  if (n == VL) return Elem<T>::load(p);
#ifdef __AVX512BF16__  // whose CPUs all have the masks of AVX512BW and VL
  if constexpr (std::is_same_v<T, bf16>) {
    __m256i half = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
#endif
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#endif
  T some[VL] = {};
  memcpy(some, p, n * sizeof(T));
  return Elem<T>::load(some);
}

template <class T>
static INLINE void put(T* p, Vec v, long n) {
  if (n == VL) return Elem<T>::store(p, v);
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#endif
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bf16>)
    return _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1),
                                    (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
  T some[VL];
  Elem<T>::store(some, v);
  memcpy(p, some, n * sizeof(T));
}

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

}  // namespace headway
