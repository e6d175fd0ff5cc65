// A row's RMSNorm and rotation, for pointwise.cpp and paged_attention.cpp.
#pragma once
#include "sweep.h"

namespace headway {

// 1 / sqrt(mean(x²) + eps)
template <class T>
static INLINE float scale_of(const T* x, long L, float eps) {
  Vec squares = {};
  sweep(L, EACH {
    const Vec v = get(x + i, n);
    squares += v * v;
  });
  return 1.f / sqrtf(total(squares) / L + eps);
}

// x, with NORM x·scale·w, rotated; turn −1 rotates back.
template <bool NORM, class T>
static INLINE void turn_row(const T* x, const float* w, float scale, const float* cos, const float* sin,
                     float turn, long half, T* out) {
  sweep(half, EACH {
    Vec a = get(x + i, n), b = get(x + half + i, n);
    const Vec c = get(cos + i, n), s = turn * get(sin + i, n);
    if (NORM) a *= scale * get(w + i, n), b *= scale * get(w + half + i, n);
    put(out + i, a * c - b * s, n);
    put(out + half + i, b * c + a * s, n);
  });
}

}  // namespace headway
