// Products with packed weights: see panels.h for the layout, ../packed.py for the arguments.
#include "panels.h"

using namespace headway;

namespace {

constexpr long ROWS = 192;  // of x that stay in the second-level cache while panels pass
constexpr long FEW = 1 << 16;  // products below which waking threads costs more than the work

template <class T>
constexpr long units_of_row(long K) {
  return pad(K, Elem<T>::PER) / Elem<T>::PER;
}

// out [rows, heads, cols] = x [rows, heads, K] · w [heads] (+ bias [heads, cols])
template <class T, class W, class O>
void linear(const T* x, const W* w, const float* bias, long rows, long heads, long K, long cols, O* out,
            int threads) {
  const long units = units_of_row<T>(K), panels = panels_of(cols), blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * heads * units * cols > FEW)
  for (long i = 0; i < blocks * heads * panels; ++i) {
    const long p = i % panels, h = i / panels % heads, first = i / panels / heads * ROWS;
    const long n = rows - first < ROWS ? rows - first : ROWS, width = panel_width(cols, p);
    const Unit* a = (const Unit*)x + (first * heads + h) * units;
    const W* b = w + (h * pad(cols, VL) + p * PANEL) * units;
    float* c = (float*)scratch(ROWS * PANEL * sizeof(float));
    panel_product<T>(n, units, a, heads * units, b, width, c);
    for (long r = 0; r < n; ++r)
      for (long j = 0; j < width; j += VL) {
        const long at = p * PANEL + j, left = cols - at < VL ? cols - at : VL;
        Vec v = load(c + r * PANEL + j);
        if (bias) v += get(bias + h * cols + at, left);
        put(out + ((first + r) * heads + h) * cols + at, v, left);
      }
  }
}

// w [heads, cols, K] of S into panels.
template <class T, class S>
void pack(const S* w, long heads, long K, long cols, Unit* out, int threads) {
  const long units = units_of_row<T>(K), panels = panels_of(cols);
  large_pages(out, heads * units * pad(cols, VL) * sizeof(Unit));
#pragma omp parallel for num_threads(threads) schedule(static) if (heads * K * cols > FEW)
  for (long i = 0; i < heads * panels; ++i) {
    const long h = i / panels, p = i % panels, n = cols - p * PANEL < PANEL ? cols - p * PANEL : PANEL;
    Unit* to = out + (h * pad(cols, VL) + p * PANEL) * units;
    pack_columns<T>(w + (h * cols + p * PANEL) * K, K, n, K, to, panel_width(cols, p));
  }
}

// The same of bfloat16, for products in float32.
void pack_narrow(const bf16* w, long heads, long K, long cols, bf16* out, int threads) {
  const long panels = panels_of(cols);
  large_pages(out, heads * K * pad(cols, VL) * sizeof(bf16));
#pragma omp parallel for num_threads(threads) schedule(static) if (heads * K * cols > FEW)
  for (long i = 0; i < heads * panels; ++i) {
    const long h = i / panels, p = i % panels, n = cols - p * PANEL < PANEL ? cols - p * PANEL : PANEL;
    const long width = panel_width(cols, p);
    Unit* wide = (Unit*)scratch(K * width * sizeof(Unit));
    pack_columns<float>(w + (h * cols + p * PANEL) * K, K, n, K, wide, width);
    halve(wide, K * width, out + (h * pad(cols, VL) + p * PANEL) * K);
  }
}

// out [n, K]: the given columns of a packed matrix, which are rows of the weight; NaN for one that it has not.
template <class T, class W>
void unpack(const W* w, const int64_t* index, long n, long K, long cols, T* out, int threads) {
  constexpr int PER = Elem<T>::PER;
  const long units = units_of_row<T>(K);
#pragma omp parallel for num_threads(threads) schedule(static) if (n * K > FEW)
  for (long i = 0; i < n; ++i) {
    T* to = out + i * K;
    if (index[i] < 0 || index[i] >= cols) {
      memset(to, 0xff, K * sizeof(T));
      continue;
    }
    const long p = index[i] / PANEL, width = panel_width(cols, p);
    const W* from = w + p * PANEL * units + index[i] % PANEL;
    for (long u = 0; u < units; ++u, from += width)
      if constexpr (sizeof(W) < sizeof(T)) to[u] = value(from);
      else memcpy(to + u * PER, from, (K - u * PER < PER ? K - u * PER : PER) * sizeof(T));
  }
}

}  // namespace

extern "C" {

// `narrow`: the weight is bfloat16, not float32. `wide`: the result is float32, not T.
#define HEADWAY_PACKED(T, name)                                                                            \
  long headway_packed_units_##name(long heads, long K, long cols) {                                        \
    return heads * units_of_row<T>(K) * pad(cols, VL);                                                     \
  }                                                                                                        \
  void headway_pack_##name(const void* w, long narrow, long heads, long K, long cols, Unit* out,           \
                           int threads) {                                                                  \
    if (narrow) return pack<T>((const bf16*)w, heads, K, cols, out, threads);                              \
    pack<T>((const float*)w, heads, K, cols, out, threads);                                                \
  }                                                                                                        \
  void headway_unpack_##name(const Unit* w, const int64_t* index, long n, long K, long cols, T* out,       \
                             int threads) {                                                                \
    unpack(w, index, n, K, cols, out, threads);                                                            \
  }                                                                                                        \
  void headway_packed_linear_##name(const T* x, const Unit* w, const float* bias, long rows, long heads,   \
                                    long K, long cols, long wide, void* out, int threads) {                \
    if (wide) return linear(x, w, bias, rows, heads, K, cols, (float*)out, threads);                       \
    linear(x, w, bias, rows, heads, K, cols, (T*)out, threads);                                            \
  }

HEADWAY_PACKED(float, float32)

void headway_pack_narrow_float32(const bf16* w, long heads, long K, long cols, bf16* out, int threads) {
  pack_narrow(w, heads, K, cols, out, threads);
}
void headway_unpack_narrow_float32(const bf16* w, const int64_t* index, long n, long K, long cols, float* out,
                                   int threads) {
  unpack(w, index, n, K, cols, out, threads);
}
void headway_narrow_linear_float32(const float* x, const bf16* w, const float* bias, long rows, long heads, long K,
                                   long cols, long, float* out, int threads) {
  linear(x, w, bias, rows, heads, K, cols, out, threads);
}
#ifdef __AVX512BF16__
HEADWAY_PACKED(bf16, bfloat16)
#endif
}
