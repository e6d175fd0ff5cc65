// Elementwise work of a transformer, one pass over memory each way: RMSNorm, rotary embedding, both
// at once, and the activation of dense feed-forward networks.
//
// The equations are in ../norm.py, ../rope.py and ../activation.py. Rows of L (or G·F) elements of
// T; weights, tables and all arithmetic are float32, rounded once. A row does not depend on the
// thread that computed it, and weight gradients are summed over fixed chunks of rows, so results
// are the same bits on any number of threads.
#include "activation.h"
#include "rotate.h"

using namespace headway;

namespace {

// ---- rows ---------------------------------------------------------------------------------------

template <class T>
INLINE void norm_row(const T* x, const float* w, float scale, long L, T* out) {
  sweep(L, EACH { put(out + i, get(x + i, n) * scale * get(w + i, n), n); });
}

// x̂ = x·scale; dw += dy·x̂; dx = scale·(w·dy − x̂·mean(w·dy·x̂))
template <class T>
INLINE void norm_row_back(const T* dy, const T* x, const float* w, float scale, long L, T* dx,
                          float* dw) {
  Vec dots = {};
  sweep(L, EACH {
    const Vec part = get(dy + i, n) * (get(x + i, n) * scale);
    put(dw + i, get(dw + i, n) + part, n);
    dots += part * get(w + i, n);
  });
  const float mean = total(dots) / L;
  sweep(L, EACH {
    put(dx + i, scale * (get(dy + i, n) * get(w + i, n) - get(x + i, n) * scale * mean), n);
  });
}

// norm_row_back of dy rotated back; the rotation is made twice rather than kept.
template <class T>
INLINE void norm_turn_row_back(const T* dy, const T* x, const float* w, float scale,
                               const float* cos, const float* sin, long half, T* dx, float* dw) {
  Vec dots = {};
  const auto back = [&](long i, long n, Vec& a, Vec& b) __attribute__((always_inline)) {
    const Vec p = get(dy + i, n), q = get(dy + half + i, n);
    const Vec c = get(cos + i, n), s = get(sin + i, n);
    a = p * c + q * s, b = q * c - p * s;
  };
  sweep(half, EACH {
    Vec a, b;
    back(i, n, a, b);
    a *= get(x + i, n) * scale, b *= get(x + half + i, n) * scale;
    put(dw + i, get(dw + i, n) + a, n);
    put(dw + half + i, get(dw + half + i, n) + b, n);
    dots += a * get(w + i, n) + b * get(w + half + i, n);
  });
  const float mean = total(dots) / (2 * half);
  sweep(half, EACH {
    Vec a, b;
    back(i, n, a, b);
    put(dx + i, scale * (a * get(w + i, n) - get(x + i, n) * scale * mean), n);
    put(dx + half + i, scale * (b * get(w + half + i, n) - get(x + half + i, n) * scale * mean), n);
  });
}

// ---- all rows -----------------------------------------------------------------------------------

// row(r, dw) for every row; dw [W] is summed over at most 64 chunks, whose rows start at a multiple
// of `heads`, in their order.
template <class F>
void sum_over_rows(long rows, long heads, long row_size, long W, float* dw, int threads, F row) {
  const long even = (rows + 63) / 64, each = pad(even < 16 ? 16 : even, heads);
  const long chunks = (rows + each - 1) / each;
  float* sums = (float*)scratch(chunks * W * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * row_size > SMALL)
  for (long c = 0; c < chunks; ++c) {
    const long last = (c + 1) * each < rows ? (c + 1) * each : rows;
    memset(sums + c * W, 0, W * sizeof(float));
    for (long r = c * each; r < last; ++r) row(r, sums + c * W);
  }
  memset(dw, 0, W * sizeof(float));
  for (long c = 0; c < chunks; ++c)
    sweep(W, EACH { put(dw + i, get(dw + i, n) + get(sums + c * W + i, n), n); });
}

template <class T>
void activation_forward(const T* pre, long rows, long F, int activation, T* hid, int threads) {
  const long row_size = is_gated(activation) ? 2 * F : F;
  over_rows(rows, row_size, threads, [&](long r) {
    const T *gate = pre + r * row_size, *up = gate + (row_size - F);
    sweep(F, EACH {
      Vec none;
      const Vec made = activate<false>(activation, get(gate + i, n), get(up + i, n), none, none);
      put(hid + r * F + i, made, n);
    });
  });
}

template <class T>
void activation_backward(const T* d_hid, const T* pre, long rows, long F, int activation, T* d_pre,
                         int threads) {
  const long row_size = is_gated(activation) ? 2 * F : F;
  over_rows(rows, row_size, threads, [&](long r) {
    const T *gate = pre + r * row_size, *up = gate + (row_size - F), *back = d_hid + r * F;
    T* out = d_pre + r * row_size;
    sweep(F, EACH {
      Vec d_gate, d_up;
      const Vec d = get(back + i, n);
      activate<true>(activation, get(gate + i, n), get(up + i, n), d_gate, d_up);
      put(out + i, d * d_gate, n);
      if (is_gated(activation)) put(out + F + i, d * d_up, n);
    });
  });
}

// y [rows, d] · σ(gate [rows])
template <class T>
void gate_heads(const T* y, const T* gate, long rows, long d, T* out, int threads) {
  over_rows(rows, d, threads, [&](long r) {
    const Vec open = sigmoid(splat(Elem<T>::wide(gate[r])));
    sweep(d, EACH { put(out + r * d + i, get(y + r * d + i, n) * open, n); });
  });
}

// cap·tanh(x/cap)
void softcap(const float* x, long size, float cap, float* out, int threads) {
  constexpr long ROW = 4096;
  over_rows((size + ROW - 1) / ROW, ROW, threads, [&](long r) {
    const long from = r * ROW, n_row = size - from < ROW ? size - from : ROW;
    sweep(n_row, EACH {
      const Vec z = get(x + from + i, n) / cap, z2 = z * z;
      // 1 − 2/(e^2z + 1) would lose the digits of small values
      const Vec near = z + z * z2 * (-1.f / 3 + z2 * (2.f / 15 + z2 * (-17.f / 315 + z2 * (62.f / 2835))));
      const Vec far = 1.f - 2.f / (exp(2.f * z) + 1.f);
      put(out + from + i, cap * (z2 < 0.04f ? near : far), n);
    });
  });
}

}  // namespace

extern "C" {

// cos, sin [S, half] of position · frequency [half], in double until they are rounded
void headway_rope_rows_float32(const int64_t* position, const double* frequency, long S, long half,
                               float factor, float* cos, float* sin, int threads) {
  over_rows(S, 16 * half, threads, [&](long s) {
    for (long i = 0; i < half; ++i) {
      const double angle = position[s] * frequency[i];
      cos[s * half + i] = (float)(factor * std::cos(angle)), sin[s * half + i] = (float)(factor * std::sin(angle));
    }
  });
}

void headway_softcap_float32(const float* x, long size, float cap, float* out, int threads) {
  softcap(x, size, cap, out, threads);
}


// x [rows, L], w [heads, L] (row r reads r % heads); scale [rows], written for backward, may be null.
// cos, sin [S, half]; x [rows = … · S · heads, 2·half].
#define HEADWAY_POINTWISE(T, name)                                                                   \
  void headway_norm_##name(const T* x, const float* w, long rows, long heads, long L, float eps,     \
                           T* out, float* scale, int threads) {                                      \
    over_rows(rows, L, threads, [&](long r) {                                                        \
      const float by = scale_of(x + r * L, L, eps);                                                  \
      if (scale) scale[r] = by;                                                                      \
      norm_row(x + r * L, w + r % heads * L, by, L, out + r * L);                                    \
    });                                                                                              \
  }                                                                                                  \
  void headway_norm_backward_##name(const T* dy, const T* x, const float* w, const float* scale,     \
                                    long rows, long heads, long L, T* dx, float* dw, int threads) {  \
    sum_over_rows(rows, heads, L, heads * L, dw, threads, [&](long r, float* sum) {                  \
      const long at = r * L, head = r % heads * L;                                                   \
      norm_row_back(dy + at, x + at, w + head, scale[r], L, dx + at, sum + head);                    \
    });                                                                                              \
  }                                                                                                  \
  void headway_rope_##name(const T* x, const float* cos, const float* sin, long rows, long S,        \
                           long heads, long half, float turn, T* out, int threads) {                 \
    over_rows(rows, 2 * half, threads, [&](long r) {                                                 \
      const long at = r * 2 * half, s = r / heads % S * half;                                        \
      turn_row<false>(x + at, nullptr, 1.f, cos + s, sin + s, turn, half, out + at);                 \
    });                                                                                              \
  }                                                                                                  \
  void headway_norm_rope_##name(const T* x, const float* w, const float* cos, const float* sin,      \
                                long rows, long S, long heads, long half, float eps, T* out,         \
                                float* scale, int threads) {                                         \
    over_rows(rows, 2 * half, threads, [&](long r) {                                                 \
      const long at = r * 2 * half, s = r / heads % S * half;                                        \
      const float by = scale_of(x + at, 2 * half, eps);                                              \
      if (scale) scale[r] = by;                                                                      \
      turn_row<true>(x + at, w, by, cos + s, sin + s, 1.f, half, out + at);                          \
    });                                                                                              \
  }                                                                                                  \
  void headway_norm_rope_backward_##name(const T* dy, const T* x, const float* w, const float* scale,\
                                         const float* cos, const float* sin, long rows, long S,      \
                                         long heads, long half, T* dx, float* dw, int threads) {     \
    sum_over_rows(rows, 1, 2 * half, 2 * half, dw, threads, [&](long r, float* sum) {                \
      const long at = r * 2 * half, s = r / heads % S * half;                                        \
      norm_turn_row_back(dy + at, x + at, w, scale[r], cos + s, sin + s, half, dx + at, sum);        \
    });                                                                                              \
  }                                                                                                  \
  void headway_gate_heads_##name(const T* y, const T* gate, long rows, long d, T* out, int threads) { \
    gate_heads(y, gate, rows, d, out, threads);                                                      \
  }                                                                                                  \
  void headway_activation_##name(const T* pre, long rows, long F, long activation, T* hid,           \
                                 int threads) {                                                      \
    activation_forward(pre, rows, F, activation, hid, threads);                                      \
  }                                                                                                  \
  void headway_activation_backward_##name(const T* d_hid, const T* pre, long rows, long F,           \
                                          long activation, T* d_pre, int threads) {                  \
    activation_backward(d_hid, pre, rows, F, activation, d_pre, threads);                            \
  }

HEADWAY_POINTWISE(float, float32)
#ifdef __AVX512BF16__
HEADWAY_POINTWISE(bf16, bfloat16)
#endif
}
