// Experts with weights packed for inference, from the router's answer to the sum over slots.
//
// The equations are in ../experts.py, the layout of a matrix in panels.h. N sub-tokens · L width · F hidden
// width · G pre-activations per hidden unit · K slots. T is the dtype of the matmuls and of the weights;
// sums, activations and gates are float32. gate, up and down of an expert lie together:
//
//     [ panels of w_in: units of L × G·F columns ][ panels of w_out: units of F × L columns ]
//
// (of bfloat16 weights as `bf16` where T is float) and are read once per pass, whatever the number of rows. A
// row's result depends on nothing but the row, and is that of experts.cpp bit for bit.
#include "activation.h"
#include "panels.h"

using namespace headway;

extern "C" void headway_sort_rows_float32(const int64_t* index, long T, long H, long K, long E, int64_t* slot,
                                          int64_t* row, int64_t* counts, int);

namespace {

template <class T>
struct Sizes {
  static constexpr int PER = Elem<T>::PER;
  long L, F, G;
  long Fp = pad(F, VL), GFp = G * Fp, Lp = pad(L, VL);
  long Lu = pad(L, PER) / PER, Fu = pad(F, PER) / PER;
  long in = Lu * GFp, all = in + Fu * Lp;  // units of an expert
};

// ---- packing ------------------------------------------------------------------------------------

// [units][cols] into panels.
void panels(const Unit* from, long units, long cols, Unit* out) {
  for (long p = 0; p < panels_of(cols); ++p) {
    const long width = panel_width(cols, p);
    for (long u = 0; u < units; ++u, out += width)
      memcpy(out, from + u * cols + p * PANEL, width * sizeof(Unit));
  }
}

template <class T, class S>
void pack(const S* w_in, const S* w_out, long experts, const Sizes<T>& s, Unit* out, int threads) {
  large_pages(out, experts * s.all * sizeof(Unit));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long e = 0; e < experts; ++e) {
    Unit *rows = (Unit*)malloc(s.all * sizeof(Unit)), *to = out + e * s.all;
    for (long g = 0; g < s.G; ++g)
      pack_columns<T>(w_in + (e * s.G + g) * s.F * s.L, s.L, s.F, s.L, rows + g * s.Fp, s.GFp);
    pack_rows<T>(w_out + e * s.F * s.L, s.L, s.F, s.L, rows + s.in, s.Lp);
    panels(rows, s.Lu, s.GFp, to);
    panels(rows + s.in, s.Fu, s.Lp, to + s.in);
    free(rows);
  }
}

void pack_narrow(const bf16* w_in, const bf16* w_out, long experts, const Sizes<float>& s, bf16* out, int threads) {
  large_pages(out, experts * s.all * sizeof(bf16));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long e = 0; e < experts; ++e) {
    Unit* wide = (Unit*)malloc(s.all * sizeof(Unit));
    pack(w_in + e * s.G * s.F * s.L, w_out + e * s.F * s.L, 1, s, wide, 1);
    halve(wide, s.all, out + e * s.all);
    free(wide);
  }
}

// ---- the product --------------------------------------------------------------------------------

constexpr long BLOCK = 192;  // rows of an expert whose intermediates fit the second-level cache
constexpr long NARROW = 1 << 17;  // units of an expert up to which the next one is asked for meanwhile

// Column j of row r in a result of panels, each [rows][PANEL].
INLINE float* at(float* c, long rows, long r, long j) { return c + (j / PANEL * rows + r) * PANEL + j % PANEL; }

template <int A, class T>
void hidden(float* pre, long rows, const Sizes<T>& s, T* hid) {
  for (long r = 0; r < rows; ++r, hid += s.Fp)
    for (long f = 0; f < s.Fp; f += VL) {
      Vec none;
      const Vec gate = load(at(pre, rows, r, f)), up = load(at(pre, rows, r, s.GFp - s.Fp + f));
      Elem<T>::store(hid + f, activate<false>(A, gate, up, none, none));
    }
}

// y [rows, L] of the sub-tokens of an expert, whose slots are `slot`. `next` are the weights of the next expert,
// or null.
template <class T, class W>
void expert(const T* x, const W* w, const W* next, const int64_t* slot, long K, long rows,
            const Sizes<T>& s, long activation, float* y) {
  constexpr int PER = Elem<T>::PER;
  const long most = rows < BLOCK ? rows : BLOCK, wide = s.GFp > s.Lp ? s.GFp : s.Lp;
  T *xs, *hid;
  float* c;
  Slices a;
  for (int pass = 0; pass < 2; ++pass) {
    xs = a.take<T>(most * s.Lu * PER), hid = a.take<T>(most * s.Fp);
    c = a.take<float>(most * pad(wide, PANEL));
    if (!pass) a = {scratch(a.used)};
  }
  for (long first = 0; first < rows; first += BLOCK, slot += BLOCK, y += BLOCK * s.L) {
    const long n = rows - first < BLOCK ? rows - first : BLOCK;
    for (long r = 0; r < n; ++r) {
      T* to = xs + r * s.Lu * PER;
      memset(to + s.Lu * PER - PER, 0, PER * sizeof(T));
      memcpy(to, x + slot[r] / K * s.L, s.L * sizeof(T));
    }
    const W* b = w;
    for (long p = 0; p < panels_of(s.GFp); ++p) {
      const long width = panel_width(s.GFp, p);
      panel_product<T>(n, s.Lu, (Unit*)xs, s.Lu, b, width, c + p * n * PANEL, next ? next + (b - w) : next);
      b += s.Lu * width;
    }
    switch (activation) {
      case SWIGLU: hidden<SWIGLU, T>(c, n, s, hid); break;
      case RELU2: hidden<RELU2, T>(c, n, s, hid); break;
      case SWIGLU_CLAMPED: hidden<SWIGLU_CLAMPED, T>(c, n, s, hid); break;
      default: hidden<GELU, T>(c, n, s, hid);
    }
    for (long p = 0; p < panels_of(s.Lp); ++p) {
      const long width = panel_width(s.Lp, p);
      panel_product<T>(n, s.Fu, (Unit*)hid, s.Fp / PER, b, width, c, next ? next + (b - w) : next);
      b += s.Fu * width;
      for (long r = 0; r < n; ++r)
        for (long j = 0; j < width; j += VL) {
          const long l = p * PANEL + j, left = s.L - l < VL ? s.L - l : VL;
          put(y + r * s.L + l, load(c + r * PANEL + j), left);
        }
    }
  }
}

// out[n] = Σ_k gate[n, k] · y[row[n, k]], slots in their order; rows from `taken` on are no expert's.
template <class T>
void combine(const float* y, const int64_t* row, const float* gate, long taken, long N, long K, long L, T* out,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (N * K * L > 65536)
  for (long n = 0; n < N; ++n)
    for (long l = 0; l < L; l += VL) {
      const long left = L - l < VL ? L - l : VL;
      Vec v = {};
      for (long k = 0; k < K; ++k) {
        const long r = row[n * K + k];
        if (r < taken) v += gate[n * K + k] * get(y + r * L + l, left);
      }
      put(out + n * L + l, v, left);
    }
}

template <class T, class W>
void forward(const T* x, const float* gate, const int64_t* index, const W* w, long tokens, long H, long K,
             long E, const Sizes<T>& s, long activation, float* y, T* out, int threads) {
  const long N = tokens * H, R = N * K, groups = H * E;
  int64_t* slot = (int64_t*)malloc((2 * R + 3 * groups + 1) * sizeof(int64_t));
  int64_t *row = slot + R, *counts = row + R, *start = counts + groups, *busy = start + groups + 1;
  headway_sort_rows_float32(index, tokens, H, K, E, slot, row, counts, 1);
  long n_busy = 0;
  start[0] = 0;
  for (long e = 0; e < groups; ++e) {
    start[e + 1] = start[e] + counts[e];
    if (counts[e]) busy[n_busy++] = e;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (n_busy * s.all > 65536)
  for (long i = 0; i < n_busy; ++i) {
    const long e = busy[i];
    const W* next = i + 1 < n_busy && s.all <= NARROW ? w + busy[i + 1] * s.all : nullptr;
    expert(x, w + e * s.all, next, slot + start[e], K, counts[e], s, activation, y + start[e] * s.L);
  }
  combine(y, row, gate, start[groups], N, K, s.L, out, threads);
  free(slot);
}

}  // namespace

extern "C" {

// w_in [experts, G, F, L], w_out [experts, F, L], bfloat16 if `narrow` and else float32.
#define HEADWAY_PACKED_EXPERTS(T, name)                                                                   \
  long headway_packed_expert_units_##name(long L, long F, long G) { return Sizes<T>{L, F, G}.all; }       \
  void headway_pack_experts_##name(const void* w_in, const void* w_out, long narrow, long experts, long L, \
                                   long F, long G, Unit* out, int threads) {                              \
    const Sizes<T> s{L, F, G};                                                                            \
    if (narrow) return pack((const bf16*)w_in, (const bf16*)w_out, experts, s, out, threads);             \
    pack((const float*)w_in, (const float*)w_out, experts, s, out, threads);                              \
  }                                                                                                       \
  void headway_packed_experts_##name(const T* x, const float* gate, const int64_t* index, const Unit* w,  \
                                     long tokens, long H, long K, long E, long L, long F, long G,         \
                                     long activation, float* y, T* out, int threads) {                    \
    forward<T, Unit>(x, gate, index, w, tokens, H, K, E, Sizes<T>{L, F, G}, activation, y, out, threads);       \
  }

HEADWAY_PACKED_EXPERTS(float, float32)

void headway_pack_narrow_experts_float32(const bf16* w_in, const bf16* w_out, long experts, long L, long F, long G,
                                         bf16* out, int threads) {
  pack_narrow(w_in, w_out, experts, Sizes<float>{L, F, G}, out, threads);
}
void headway_narrow_experts_float32(const float* x, const float* gate, const int64_t* index, const bf16* w,
                                    long tokens, long H, long K, long E, long L, long F, long G, long activation,
                                    float* y, float* out, int threads) {
  forward<float, bf16>(x, gate, index, w, tokens, H, K, E, Sizes<float>{L, F, G}, activation, y, out, threads);
}
#ifdef __AVX512BF16__
HEADWAY_PACKED_EXPERTS(bf16, bfloat16)
#endif
}
