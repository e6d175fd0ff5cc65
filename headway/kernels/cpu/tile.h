// A register-tiled matrix product with float32 accumulation, for float32 and (AVX512-BF16) bfloat16.
//
// Operands are read in *units* of four bytes along the summed dim: one float, or a pair of bfloat16.
// Both operands are addressed by strides counted in units, so a row-major matrix whose rows are
// summed over, or a unit-major one ([unit][row], from `pack_*`), serve without a copy:
//
//     C[i, j] (+)= Σ_u A[i·a_row + u·a_unit] · B[u·b_unit + j]
//
// B is read in vectors along j: its rows are padded to VL with zeros. C is float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "scratch.h"

namespace headway {

#ifdef __AVX512F__
constexpr int VL = 16, MR = 6, NR = 4;  // 24 accumulators of 32 registers
#else
constexpr int VL = 8, MR = 6, NR = 2;  // 12 of 16
#endif
typedef float Vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t Unit;
#define INLINE inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};

static INLINE Vec load(const float* p) { return *(const Vec*)p; }
static INLINE void store(float* p, Vec v) { *(Vec*)p = v; }
static INLINE Vec splat(float x) { return x - Vec{}; }
static INLINE float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < VL; ++i) s += v[i];
  return s;
}

// a·b + c, rounded once. A compiler that is free to contract a·b + c does so in one instance of a
// template and not in another (GCC for Zen 2 and 3: not where a loop has one sum), and the bits of a
// row would depend on how many rows are multiplied with it.
static INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// ---- element types ------------------------------------------------------------------------------

template <class T>
struct Elem;  // PER: elements per unit

template <>
struct Elem<float> {
  static constexpr int PER = 1;
  static INLINE float wide(float x) { return x; }
  static INLINE float narrow(float x) { return x; }
  static INLINE Vec load(const float* p) { return headway::load(p); }
  static INLINE void store(float* p, Vec v) { headway::store(p, v); }
  static INLINE Unit pair(const float* even, const float*) { Unit u; memcpy(&u, even, 4); return u; }
};

template <>
struct Elem<bf16> {
  static constexpr int PER = 2;
  static INLINE float wide(bf16 x) {
    uint32_t b = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &b, 4);
    return f;
  }
  static INLINE bf16 narrow(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t b;
    memcpy(&b, &x, 4);
    if ((b & 0x7fffffffu) > 0x7f800000u) return {(uint16_t)(b >> 16 | 64)};
    return {(uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16)};
  }
  static INLINE Vec load(const bf16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)  // of GCC 12's code for the conversion below 32 rows take 1.4 times as long
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    typedef uint16_t Half __attribute__((vector_size(VL * 2), aligned(2), may_alias));
    return (Vec)(__builtin_convertvector(*(const Half*)p, Int) << 16);
#endif
  }
  static INLINE void store(bf16* p, Vec v) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    for (int i = 0; i < VL; ++i) p[i] = narrow(v[i]);
#endif
  }
};

// VL units whose halves come from two vectors of floats (for float32: the first alone).
template <class T>
static INLINE Int units_of(Vec even, Vec odd);
template <>
INLINE Int units_of<float>(Vec even, Vec) { return (Int)even; }
#ifdef __AVX512BF16__
template <>
INLINE Int units_of<bf16>(Vec even, Vec odd) {
  __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
  __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
  return (Int)_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
}
#endif

template <class T>
static INLINE Vec dot(Vec acc, Unit a, const Unit* b);
template <>
INLINE Vec dot<float>(Vec acc, Unit a, const Unit* b) {
  float f;
  memcpy(&f, &a, 4);
  return fma(splat(f), load((const float*)b), acc);
}
// Of a weight that is stored in half of the bytes: widened on its way, which rounds nothing.
template <class T>
static INLINE Vec dot(Vec acc, Unit a, const bf16* b) {
  static_assert(std::is_same_v<T, float>);
  float f;
  memcpy(&f, &a, 4);
  return fma(splat(f), Elem<bf16>::load(b), acc);
}
#ifdef __AVX512BF16__
template <>
INLINE Vec dot<bf16>(Vec acc, Unit a, const Unit* b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a),
                               (__m512bh)_mm512_loadu_si512(b));
}
#endif

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

// ---- the product --------------------------------------------------------------------------------

static __attribute__((noinline)) void part(const float* from, int rows, int from_row, int cols, float* c,
                                           long c_row, bool add) {
  for (int i = 0; i < rows; ++i, from += from_row, c += c_row)
    for (int j = 0; j < cols; ++j) c[j] = add ? c[j] + from[j] : from[j];
}

template <class T, int M, int N>
static __attribute__((noinline)) void tile(long units, const Unit* a, long a_row, long a_unit, const Unit* b, long b_unit,
                 float* c, long c_row, bool add, int last) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = Vec{};
  for (long u = 0; u < units; ++u, a += a_unit, b += b_unit)
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = dot<T>(acc[i][j], a[i * a_row], b + j * VL);
  if (last < VL) {  // through memory: C ends within the last vector
    float whole[M][N * VL];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) store(whole[i] + j * VL, acc[i][j]);
    part(whole[0], M, N * VL, (N - 1) * VL + last, c, c_row, add);
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float* at = c + i * c_row + j * VL;
      store(at, add ? load(at) + acc[i][j] : acc[i][j]);
    }
}

template <class T, int N>
static void column(long rows, long units, const Unit* a, long a_row, long a_unit, const Unit* b,
                   long b_unit, float* c, long c_row, bool add, int last) {
  long i = 0;
  for (; i + MR <= rows; i += MR)
    tile<T, MR, N>(units, a + i * a_row, a_row, a_unit, b, b_unit, c + i * c_row, c_row, add, last);
  a += i * a_row, c += i * c_row;
#define HEADWAY_ROWS(n) \
  case n: tile<T, n, N>(units, a, a_row, a_unit, b, b_unit, c, c_row, add, last); break;
  switch (rows - i) { HEADWAY_ROWS(1) HEADWAY_ROWS(2) HEADWAY_ROWS(3) HEADWAY_ROWS(4) HEADWAY_ROWS(5) }
#undef HEADWAY_ROWS
}

// C [rows, cols] (+)= A [rows, units] · B [units, cols]; strides in units (C: in floats).
template <class T>
static void product(long rows, long cols, long units, const Unit* a, long a_row, long a_unit,
                    const Unit* b, long b_unit, float* c, long c_row, bool add = false) {
  for (long j = 0; j < cols; j += NR * VL) {
    long left = cols - j;
    int vectors = left >= NR * VL ? NR : (int)((left + VL - 1) / VL);
    int last = left >= NR * VL ? VL : (int)(left - (vectors - 1) * VL);
    switch (vectors) {
      case 1: column<T, 1>(rows, units, a, a_row, a_unit, b + j, b_unit, c + j, c_row, add, last); break;
      case 2: column<T, 2>(rows, units, a, a_row, a_unit, b + j, b_unit, c + j, c_row, add, last); break;
#ifdef __AVX512F__
      case 3: column<T, 3>(rows, units, a, a_row, a_unit, b + j, b_unit, c + j, c_row, add, last); break;
      default: column<T, NR>(rows, units, a, a_row, a_unit, b + j, b_unit, c + j, c_row, add, last);
#endif
    }
  }
}

// ---- packing: matrices of S (float or bf16) into units of T, zeros where the matrix ends ---------

template <class S>
static INLINE float value(const S* p) { return Elem<S>::wide(*p); }

// out[u][j] for j < cols: rows PER·u, PER·u + 1 of `in`; the summed dim is the rows of `in`.
template <class T, class S>
static void pack_rows(const S* in, long in_row, long rows, long cols, Unit* out, long out_unit) {
  constexpr int PER = Elem<T>::PER;
  for (long r = 0; r < rows; r += PER, out += out_unit, in += PER * in_row) {
    bool both = PER == 2 && r + 1 < rows;
    long j = 0;
    for (; j + VL <= cols; j += VL) {
      Vec even = Elem<S>::load(in + j), odd = both ? Elem<S>::load(in + in_row + j) : Vec{};
      *(Int*)(out + j) = units_of<T>(even, odd);
    }
    for (; j < out_unit; ++j) {
      float two[2] = {j < cols ? value(in + j) : 0.f, j < cols && both ? value(in + in_row + j) : 0.f};
      Int u = units_of<T>(splat(two[0]), splat(two[1]));
      out[j] = (Unit)u[0];
    }
  }
}

#if defined(__AVX512F__)
#define HEADWAY_TRANSPOSES
// 16 × 16 units, rows to columns.
static INLINE void transpose(const Int* in, Unit* out, long out_unit) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32((__m512i)in[2 * i], (__m512i)in[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)in[2 * i], (__m512i)in[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2; ++k) {
      b[4 * i + 2 * k] = _mm512_unpacklo_epi64(a[4 * i + k], a[4 * i + 2 + k]);
      b[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(a[4 * i + k], a[4 * i + 2 + k]);
    }
  // b[4i + c] holds, in lane q, column 4q + c of rows 4i … 4i + 3
  for (int c = 0; c < 4; ++c) {
    __m512i lo = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), hi = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    __m512i lo2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), hi2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    _mm512_storeu_si512(out + (c + 0) * out_unit, _mm512_shuffle_i32x4(lo, lo2, 0x88));
    _mm512_storeu_si512(out + (c + 4) * out_unit, _mm512_shuffle_i32x4(hi, hi2, 0x88));
    _mm512_storeu_si512(out + (c + 8) * out_unit, _mm512_shuffle_i32x4(lo, lo2, 0xdd));
    _mm512_storeu_si512(out + (c + 12) * out_unit, _mm512_shuffle_i32x4(hi, hi2, 0xdd));
  }
}

#elif defined(__AVX2__)
#define HEADWAY_TRANSPOSES
// 8 × 8 units, rows to columns.
static INLINE void transpose(const Int* in, Unit* out, long out_unit) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32((__m256i)in[2 * i], (__m256i)in[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)in[2 * i], (__m256i)in[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 2; ++k) {
      b[4 * i + 2 * k] = _mm256_unpacklo_epi64(a[4 * i + k], a[4 * i + 2 + k]);
      b[4 * i + 2 * k + 1] = _mm256_unpackhi_epi64(a[4 * i + k], a[4 * i + 2 + k]);
    }
  // b[4i + c] holds, in half q, column 4q + c of rows 4i … 4i + 3
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_si256((__m256i*)(out + c * out_unit), _mm256_permute2x128_si256(b[c], b[4 + c], 0x20));
    _mm256_storeu_si256((__m256i*)(out + (c + 4) * out_unit), _mm256_permute2x128_si256(b[c], b[4 + c], 0x31));
  }
}
#endif

// VL units of one row, from PER·VL elements.
template <class T, class S>
static INLINE Int row_units(const S* p) {
  if constexpr (Elem<T>::PER == 1) return (Int)Elem<S>::load(p);
#ifdef __AVX512BF16__
  else if constexpr (std::is_same_v<S, bf16>) return *(const Int*)p;
  else return (Int)(__m512i)_mm512_cvtne2ps_pbh((__m512)Elem<S>::load(p + 16), (__m512)Elem<S>::load(p));
#endif
}

// out[u][r] for r < rows: elements PER·u, PER·u + 1 of row r; the summed dim is within a row.
// Writes zeros in columns rows … pad(rows, VL).
template <class T, class S>
static void pack_columns(const S* in, long in_row, long rows, long cols, Unit* out, long out_unit) {
  constexpr int PER = Elem<T>::PER;
  const long units = (cols + PER - 1) / PER, wide = pad(rows, VL);
  long r0 = 0;
#ifdef HEADWAY_TRANSPOSES
  for (; r0 + VL <= rows; r0 += VL) {
    long u = 0;
    for (; (u + VL) * PER <= cols; u += VL) {
      Int row[VL];
      for (int i = 0; i < VL; ++i) row[i] = row_units<T>(in + (r0 + i) * in_row + u * PER);
      transpose(row, out + u * out_unit + r0, out_unit);
    }
    for (; u < units; ++u)
      for (int i = 0; i < VL; ++i) {
        const S* p = in + (r0 + i) * in_row + u * PER;
        float odd = PER == 2 && u * PER + 1 < cols ? value(p + 1) : 0.f;
        out[u * out_unit + r0 + i] = (Unit)units_of<T>(splat(value(p)), splat(odd))[0];
      }
  }
#endif
  for (long r = r0; r < wide; ++r)
    for (long u = 0; u < units; ++u) {
      const S* p = in + r * in_row + u * PER;
      float even = r < rows ? value(p) : 0.f;
      float odd = r < rows && PER == 2 && u * PER + 1 < cols ? value(p + 1) : 0.f;
      out[u * out_unit + r] = (Unit)units_of<T>(splat(even), splat(odd))[0];
    }
}

// ---- elementwise --------------------------------------------------------------------------------

// e^x to 1e-7 relative, clamped where float32 ends; NaN stays NaN.
static INLINE Vec exp(Vec x) {
  const float magic = 12582912.f;  // 1.5·2^23: adding it rounds to an integer
#ifdef __AVX512F__  // these return their second operand where one is NaN
  x = (Vec)_mm512_max_ps(_mm512_set1_ps(-87.3f), _mm512_min_ps(_mm512_set1_ps(88.7f), (__m512)x));
#else
  x = x > 88.7f ? splat(88.7f) : x;
  x = x < -87.3f ? splat(-87.3f) : x;
#endif
  Vec n = x * 1.44269504f + magic;
  Int bits = ((Int)n << 23) + 0x3f800000;
  n -= magic;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * (Vec)bits;
}

static INLINE Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

}  // namespace headway
