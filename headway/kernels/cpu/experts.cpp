// Experts on sorted rows, one expert at a time, every intermediate in this core's cache.
//
// The equations and the meaning of every argument are in ../experts.py. N sub-tokens · L width ·
// F hidden width · G pre-activations per hidden unit · K slots · R sorted rows. T is the dtype of the
// matmuls, W that in which weights are stored; sums, activations and gates are float32. A gradient of
// weights is summed in float32 and rounded to W once. The result of an expert does not depend on
// which thread computed it, so it is the same bits on any number of threads.
//
// Scratch memory is one arena per thread, filled by the same lines twice (`for pass < 2`):
//
//   pass 0   a.take<T>(n) only adds n·sizeof(T), aligned; the pointers mean nothing yet
//            then a = {scratch(a.used)}: the thread's buffer, grown if it is too small
//   pass 1   a.take<T>(n) hands out the buffer piece by piece: in | out | xs | hid | pre
//
// so the sizes stand in one place, and a warm call allocates nothing.
#include "activation.h"

using namespace headway;

namespace {

struct Shape {
  long L, F, G, Fp, GFp, Lp;  // p: padded
  Shape(long L, long F, long G) : L(L), F(F), G(G), Fp(pad(F, VL)), GFp(G * pad(F, VL)), Lp(pad(L, VL)) {}
};

// Rows of T as units: a row of n elements in pad(n, PER) elements, so that pairs end in a zero.
template <class T>
long row_of(long n) {
  return pad(n, Elem<T>::PER);
}

template <class T>
void gather(const T* x, long L, const int64_t* slot, long K, long rows, T* out) {
  const long wide = row_of<T>(L);
  for (long r = 0; r < rows; ++r, out += wide) {
    memcpy(out, x + slot[r] / K * L, L * sizeof(T));
    if (wide > L) memset(out + L, 0, sizeof(T));
  }
}

// Units [L][G·Fp] of w_in [G, F, L], summed over L.
template <class T, class W>
void pack_in(const W* w_in, const Shape& s, Unit* out) {
  for (long g = 0; g < s.G; ++g)
    pack_columns<T>(w_in + g * s.F * s.L, s.L, s.F, s.L, out + g * s.Fp, s.GFp);
}

constexpr long BLOCK = 256;  // rows of an expert whose intermediates fit the second-level cache

template <class T>
struct Item {  // rows first … first + rows of an expert
  long expert, first, rows;
};

// hid [rows, Fp] in T from pre [rows, G·Fp]; `kept` [rows, G·F], where there is one, is pre in T.
template <int A, class T>
void hidden(const float* pre, long rows, const Shape& s, T* hid, T* kept) {
  const long up = s.GFp - s.Fp;
  for (long r = 0; r < rows; ++r, pre += s.GFp, hid += s.Fp) {
    Vec none;
    for (long f = 0; f < s.Fp; f += VL)
      Elem<T>::store(hid + f, activate<false>(A, load(pre + f), load(pre + up + f), none, none));
    for (long g = 0; kept && g < s.G; ++g, kept += s.F)
      for (long f = 0; f < s.F; f += VL)
        put(kept + f, load(pre + g * s.Fp + f), s.F - f < VL ? s.F - f : VL);
  }
}

// What lies between the products of a block of rows: z = do·W_outᵀ in, everything else out. The
// units of a pair of rows (`hid_r`, `dpre_r`) are the operands of the weight gradients.
template <class T>
struct Middle {
  const Shape& s;
  long rows;
  const float *gate, *z;
  Unit* hid_r;
  T* dpre;
  Unit* dpre_r;
  float* d_gate;
};

// ROWS rows from r on, the first in a pair; pre-activations of S, `width` of them before the padding.
template <int A, int ROWS, class T, class S>
INLINE void slopes_of_rows(long r, const S* pre, long pre_row, long up, long width, const Middle<T>& m) {
  constexpr int PER = Elem<T>::PER;
  constexpr bool TWO = is_gated(A);
  const long Fp = m.s.Fp, GFp = m.s.GFp;
  Vec dot[ROWS] = {};
  for (long f = 0; f < Fp; f += VL) {
    const long n = width - f < VL ? width - f : VL;
    Vec hid[2] = {}, d_first[2] = {}, d_second[2] = {};
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) {
      const S* p = pre + (r + i) * pre_row + f;
      const Vec back = load(m.z + (r + i) * Fp + f), gate = splat(m.gate[r + i]), scaled = gate * back;
      const Vec h = activate<true>(A, get(p, n), TWO ? get(p + up, n) : Vec{}, d_first[i], d_second[i]);
      dot[i] += h * back;
      hid[i] = h * gate;
      d_first[i] *= scaled;
      Elem<T>::store(m.dpre + (r + i) * GFp + f, d_first[i]);
      if (TWO) {
        d_second[i] *= scaled;
        Elem<T>::store(m.dpre + (r + i) * GFp + Fp + f, d_second[i]);
      }
    }
    *(Int*)(m.hid_r + r / PER * Fp + f) = units_of<T>(hid[0], hid[1]);
    *(Int*)(m.dpre_r + r / PER * GFp + f) = units_of<T>(d_first[0], d_first[1]);
    if (TWO) *(Int*)(m.dpre_r + r / PER * GFp + Fp + f) = units_of<T>(d_second[0], d_second[1]);
  }
  for (int i = 0; i < ROWS; ++i) m.d_gate[r + i] = sum(dot[i]);
}

template <int A, class T, class S>
void slopes_of(const S* pre, long pre_row, long up, long width, const Middle<T>& m) {
  constexpr int PER = Elem<T>::PER;
  long r = 0;
  for (; r + PER <= m.rows; r += PER) slopes_of_rows<A, PER, T>(r, pre, pre_row, up, width, m);
  if (r < m.rows) slopes_of_rows<A, 1, T>(r, pre, pre_row, up, width, m);
}

template <class T, class S>
void slopes(int activation, const S* pre, long pre_row, long up, long width, const Middle<T>& m) {
  switch (activation) {
    case SWIGLU: return slopes_of<SWIGLU, T>(pre, pre_row, up, width, m);
    case RELU2: return slopes_of<RELU2, T>(pre, pre_row, up, width, m);
    case SWIGLU_CLAMPED: return slopes_of<SWIGLU_CLAMPED, T>(pre, pre_row, up, width, m);
    default: return slopes_of<GELU, T>(pre, pre_row, up, width, m);
  }
}

template <class T, class W>
void forward(const T* x, const W* w_in, const W* w_out, const int64_t* slot, long K,
             const Shape& s, int activation, long first, long rows, T* pre_out, float* y) {
  constexpr int PER = Elem<T>::PER;
  const long Lu = row_of<T>(s.L) / PER, Fu = pad(s.F, PER) / PER, most = rows < BLOCK ? rows : BLOCK;
  Unit *in, *out;
  T *xs, *hid;
  float* pre;
  Slices a;
  for (int pass = 0; pass < 2; ++pass) {
    in = a.take<Unit>(Lu * s.GFp), out = a.take<Unit>(Fu * s.Lp);
    xs = a.take<T>(most * Lu * PER), hid = a.take<T>(most * s.Fp), pre = a.take<float>(most * s.GFp);
    if (!pass) a = {scratch(a.used)};
  }
  pack_in<T>(w_in, s, in);
  pack_rows<T>(w_out, s.L, s.F, s.L, out, s.Lp);
  for (long at = 0; at < rows; at += BLOCK) {
    const long n = rows - at < BLOCK ? rows - at : BLOCK, row = first + at;
    gather(x, s.L, slot + row, K, n, xs);
    product<T>(n, s.GFp, Lu, (Unit*)xs, Lu, 1, in, s.GFp, pre, s.GFp);
    T* kept = pre_out ? pre_out + row * s.G * s.F : nullptr;
    switch (activation) {
      case SWIGLU: hidden<SWIGLU, T>(pre, n, s, hid, kept); break;
      case RELU2: hidden<RELU2, T>(pre, n, s, hid, kept); break;
      case SWIGLU_CLAMPED: hidden<SWIGLU_CLAMPED, T>(pre, n, s, hid, kept); break;
      default: hidden<GELU, T>(pre, n, s, hid, kept);
    }
    product<T>(n, s.L, Fu, (Unit*)hid, s.Fp / PER, 1, out, s.Lp, y + row * s.L, s.L);
  }
}

// Adds up where the gradient is float32, else in `wide`, from which `rounded` takes it.
static INLINE float* sum_of(float* dw, float*) { return dw; }
static INLINE float* sum_of(bf16*, float* wide) { return wide; }
static INLINE void rounded(const float*, float*, long) {}
static INLINE void rounded(const float* wide, bf16* dw, long n) {
  long i = 0;
  for (; i + VL <= n; i += VL) Elem<bf16>::store(dw + i, load(wide + i));
  for (; i < n; ++i) dw[i] = Elem<bf16>::narrow(wide[i]);
}

template <class T, class W>
void backward(const T* x, const T* d_out, const float* gate_R, const W* w_in, const W* w_out,
              const int64_t* slot, long K, const Shape& s, int activation, long first, long rows,
              const T* pre_in, float* dx, float* d_gate, W* dw_in, W* dw_out) {
  constexpr int PER = Elem<T>::PER;
  const long Lu = row_of<T>(s.L) / PER, most = rows < BLOCK ? rows : BLOCK, pairs = pad(most, PER) / PER;
  Unit *out_T, *in_rows, *in_T, *xi, *doi, *hid_r, *dpre_r;
  T *xs, *dos, *dpre;
  float *pre, *z, *wide;
  const long n_in = s.G * s.F * s.L, n_out = s.F * s.L;
  Slices a;
  for (int pass = 0; pass < 2; ++pass) {
    out_T = a.take<Unit>(Lu * s.Fp), in_rows = a.take<Unit>(s.GFp / PER * s.Lp);
    in_T = a.take<Unit>(pre_in ? 0 : Lu * s.GFp);
    xs = a.take<T>(most * Lu * PER), dos = a.take<T>(most * Lu * PER);
    xi = a.take<Unit>(pairs * s.Lp), doi = a.take<Unit>(pairs * s.Lp);
    hid_r = a.take<Unit>(pairs * s.Fp), dpre_r = a.take<Unit>(pairs * s.GFp);
    dpre = a.take<T>(most * s.GFp);
    pre = a.take<float>(pre_in ? 0 : most * s.GFp), z = a.take<float>(most * s.Fp);
    wide = a.take<float>(std::is_same_v<W, float> ? 0 : n_in + n_out);
    if (!pass) a = {scratch(a.used)};
  }
  float *sum_in = sum_of(dw_in, wide), *sum_out = sum_of(dw_out, wide + n_in);
  pack_columns<T>(w_out, s.L, s.F, s.L, out_T, s.Fp);
  for (long g = 0; g < s.G; ++g) {  // rows F … Fp of each half are zeros
    const long F_units = pad(s.F, PER) / PER;
    Unit* half = in_rows + g * s.Fp / PER * s.Lp;
    pack_rows<T>(w_in + g * s.F * s.L, s.L, s.F, s.L, half, s.Lp);
    memset(half + F_units * s.Lp, 0, (s.Fp / PER - F_units) * s.Lp * sizeof(Unit));
  }
  if (!pre_in) pack_in<T>(w_in, s, in_T);
  for (long at = 0; at < rows; at += BLOCK) {
    const long n = rows - at < BLOCK ? rows - at : BLOCK, row = first + at, nu = pad(n, PER) / PER;
    gather(x, s.L, slot + row, K, n, xs);
    gather(d_out, s.L, slot + row, K, n, dos);
    pack_rows<T>(xs, Lu * PER, n, s.L, xi, s.Lp);
    pack_rows<T>(dos, Lu * PER, n, s.L, doi, s.Lp);
    product<T>(n, s.Fp, Lu, (Unit*)dos, Lu, 1, out_T, s.Fp, z, s.Fp);
    if (!pre_in) product<T>(n, s.GFp, Lu, (Unit*)xs, Lu, 1, in_T, s.GFp, pre, s.GFp);
    const Middle<T> m = {s, n, gate_R + row, z, hid_r, dpre, dpre_r, d_gate + row};
    if (pre_in)
      slopes<T, T>(activation, pre_in + row * s.G * s.F, s.G * s.F, (s.G - 1) * s.F, s.F, m);
    else
      slopes<T, float>(activation, pre, s.GFp, s.GFp - s.Fp, s.Fp, m);
    product<T>(s.F, s.L, nu, hid_r, 1, s.Fp, doi, s.Lp, sum_out, s.L, at > 0);
    for (long g = 0; g < s.G; ++g)
      product<T>(s.F, s.L, nu, dpre_r + g * s.Fp, 1, s.GFp, xi, s.Lp, sum_in + g * s.F * s.L, s.L, at > 0);
    product<T>(n, s.L, s.GFp / PER, (Unit*)dpre, s.GFp / PER, 1, in_rows, s.Lp, dx + row * s.L, s.L);
  }
  rounded(sum_in, dw_in, n_in);
  rounded(sum_out, dw_out, n_out);
}

// out[n] = Σ_k weight[n, k] · y[row[n, k]], slots in their order; rows past the last group are no expert's.
template <class T>
void combine(const float* y, const int64_t* row, const float* weight, const int64_t* counts, long groups,
             long N, long K, long L, T* out, int threads) {
  long taken = 0;
  for (long g = 0; g < groups; ++g) taken += counts[g];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < N; ++n) {
    long l = 0;
    for (; l + VL <= L; l += VL) {
      Vec v = Vec{};
      for (long k = 0; k < K; ++k) {
        const long r = row[n * K + k];
        if (r < taken) v += (weight ? weight[n * K + k] : 1.f) * load(y + r * L + l);
      }
      Elem<T>::store(out + n * L + l, v);
    }
    for (; l < L; ++l) {
      float v = 0;
      for (long k = 0; k < K; ++k) {
        const long r = row[n * K + k];
        if (r < taken) v += (weight ? weight[n * K + k] : 1.f) * y[r * L + l];
      }
      out[n * L + l] = Elem<T>::narrow(v);
    }
  }
}

template <class T, class W>
void run_forward(const T* x, const W* w_in, const W* w_out, const int64_t* slot,
                 const int64_t* counts, long groups, long K, Shape s, int activation, T* pre, float* y, int threads) {
  long* start = (long*)malloc((groups + 1) * sizeof(long));
  start[0] = 0;
  for (long e = 0; e < groups; ++e) start[e + 1] = start[e] + counts[e];
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long e = 0; e < groups; ++e)
    if (counts[e])
      forward<T>(x, w_in + e * s.G * s.F * s.L, w_out + e * s.F * s.L, slot, K, s, activation, start[e],
                 counts[e], pre, y);
  free(start);
}

template <class T, class W>
void run_backward(const T* x, const T* d_out, const float* gate, const W* w_in, const W* w_out,
                  const int64_t* slot, const int64_t* counts, long groups, long K, Shape s, int activation,
                  const T* pre, float* dx, float* d_gate, W* dw_in, W* dw_out, int threads) {
  long* start = (long*)malloc((groups + 1) * sizeof(long));
  start[0] = 0;
  for (long e = 0; e < groups; ++e) start[e + 1] = start[e] + counts[e];
  const long taken = start[groups];
  float* gate_R = (float*)malloc(2 * (taken + 1) * sizeof(float));
  float* d_gate_R = gate_R + taken;
  for (long r = 0; r < taken; ++r) gate_R[r] = gate[slot[r]];
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long e = 0; e < groups; ++e) {
    const long in = s.G * s.F * s.L, out = s.F * s.L;
    if (counts[e]) {
      backward<T>(x, d_out, gate_R, w_in + e * in, w_out + e * out, slot, K, s, activation, start[e],
                  counts[e], pre, dx, d_gate_R, dw_in + e * in, dw_out + e * out);
    } else {
      memset(dw_in + e * in, 0, in * sizeof(W));
      memset(dw_out + e * out, 0, out * sizeof(W));
    }
  }
  for (long r = 0; r < taken; ++r) d_gate[slot[r]] = d_gate_R[r];  // the others were zeroed
  free(gate_R);
  free(start);
}

}  // namespace

extern "C" {

int headway_has_bfloat16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// `narrow`: weights are bfloat16, not float32.
#define HEADWAY_EXPERTS(T, name)                                                                         \
  void headway_experts_forward_##name(                                                                   \
      const T* x, const void* w_in, const void* w_out, const int64_t* slot, const int64_t* counts,       \
      long groups, long K, long L, long F, long G, long activation, long narrow, T* pre, float* y,       \
      int threads) {                                                                                     \
    const Shape s(L, F, G);                                                                              \
    if (narrow)                                                                                          \
      run_forward<T>(x, (const bf16*)w_in, (const bf16*)w_out, slot, counts, groups, K, s, activation,   \
                     pre, y, threads);                                                                   \
    else                                                                                                 \
      run_forward<T>(x, (const float*)w_in, (const float*)w_out, slot, counts, groups, K, s, activation, \
                     pre, y, threads);                                                                   \
  }                                                                                                      \
  void headway_experts_backward_##name(                                                                  \
      const T* x, const T* d_out, const float* gate, const void* w_in, const void* w_out,                \
      const int64_t* slot, const int64_t* counts, long groups, long K, long L, long F, long G,           \
      long activation, long narrow, const T* pre, float* dx, float* d_gate, void* dw_in, void* dw_out,   \
      int threads) {                                                                                     \
    const Shape s(L, F, G);                                                                              \
    if (narrow)                                                                                          \
      run_backward<T>(x, d_out, gate, (const bf16*)w_in, (const bf16*)w_out, slot, counts, groups, K, s, \
                      activation, pre, dx, d_gate, (bf16*)dw_in, (bf16*)dw_out, threads);                \
    else                                                                                                 \
      run_backward<T>(x, d_out, gate, (const float*)w_in, (const float*)w_out, slot, counts, groups, K,  \
                      s, activation, pre, dx, d_gate, (float*)dw_in, (float*)dw_out, threads);           \
  }                                                                                                      \
  void headway_combine_##name(const float* y, const int64_t* row, const float* weight,                   \
                              const int64_t* counts, long groups, long N, long K, long L, T* out,        \
                              int threads) {                                                             \
    combine<T>(y, row, weight, counts, groups, N, K, L, out, threads);                                   \
  }

HEADWAY_EXPERTS(float, float32)
#ifdef __AVX512BF16__
HEADWAY_EXPERTS(bf16, bfloat16)
#endif
}
