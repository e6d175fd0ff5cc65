// Cross-entropy of rows of logits: the loss of a row and the gradient of its logits, made while the
// row is in the cache. The equations are in ../cross_entropy.py.
#include "sweep.h"

using namespace headway;

namespace {

// Absolute error 1e-7, as bounded logits need.
INLINE Vec tanh(Vec x) { return 1.f - 2.f / (1.f + exp(2.f * x)); }

INLINE float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < VL; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// v, whose lanes from n on are past the end of the row.
INLINE Vec ended(Vec v, long n, float fill) {
  for (long j = n; j < VL; ++j) v[j] = fill;
  return v;
}

// Loss of a row of V logits; with `back` they become the gradient. bounded, slope [V] are scratch.
template <class T>
float loss_row(T* logits, long V, long target, float softcap, bool back, float* bounded,
               float* slope) {
  Vec most = splat(-INFINITY);
  sweep(V, EACH {
    Vec z = get(logits + i, n);
    if (softcap) {
      const Vec t = tanh(z / softcap);
      z = softcap * t;
      if (back) put(slope + i, 1.f - t * t, n);
    }
    put(bounded + i, z, n);
    z = ended(z, n, -INFINITY);
    most = z > most ? z : most;
  });
  const float top = largest(most), z_target = bounded[target];
  Vec sums = {};
  sweep(V, EACH {
    const Vec p = exp(get(bounded + i, n) - top);
    put(bounded + i, p, n);
    sums += ended(p, n, 0);
  });
  const float sum = total(sums);
  if (back) {
    const float one = 1.f / sum;
    sweep(V, EACH {
      const Vec p = get(bounded + i, n) * one;
      put(logits + i, softcap ? p * get(slope + i, n) : p, n);
    });
    const float off = bounded[target] * one - 1.f;
    logits[target] = Elem<T>::narrow(softcap ? off * slope[target] : off);
  }
  return logf(sum) + (top - z_target);
}

template <class T>
void cross_entropy(T* logits, const int64_t* target, long rows, long V, float softcap, bool back,
                   float* loss, int threads) {
  over_rows(rows, V, threads, [&](long r) {
    T* row = logits + r * V;
    if (target[r] >= 0 && target[r] < V) {
      float* two = (float*)scratch(2 * V * sizeof(float));
      loss[r] = loss_row(row, V, target[r], softcap, back, two, two + V);
      return;
    }
    loss[r] = target[r] < 0 ? 0.f : NAN;  // no token has that number
    if (back) memset(row, 0, V * sizeof(T));
  });
}

}  // namespace

extern "C" {

#define HEADWAY_CROSS_ENTROPY(T, name)                                                             \
  void headway_cross_entropy_##name(T* logits, const int64_t* target, long rows, long V,           \
                                    float softcap, long back, float* loss, int threads) {          \
    cross_entropy(logits, target, rows, V, softcap, back, loss, threads);                          \
  }

HEADWAY_CROSS_ENTROPY(float, float32)
#ifdef __AVX512BF16__
HEADWAY_CROSS_ENTROPY(bf16, bfloat16)
#endif
}
