// The softmax of a row of attention scores, for attention.cpp and paged_attention.cpp.
#pragma once
#include "tile.h"

namespace headway {

static INLINE Int lanes() {
  Int at;
  for (int i = 0; i < VL; ++i) at[i] = i;
  return at;
}

static INLINE float max(Vec v) {
  float m = v[0];
  for (int i = 1; i < VL; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Turns a row of scores into exp(scale · (s − max)) in T, in place (T is no wider than float): keys
// begin … end − 1 are seen, the others of `cols` become zeros. Returns scale · max; `total` is the
// sum before rounding. A `sink` is one more score, already scaled, whose weight goes nowhere.
template <class T>
static INLINE float softmax(float* s, long begin, long end, long cols, float scale, float& total,
                            float sink = -INFINITY) {
  const long from = begin / VL * VL, whole = end / VL * VL;
  auto seen = [=](long f) { return (lanes() >= (int)(begin - f)) & (lanes() < (int)(end - f)); };
  Vec top = splat(-INFINITY), mass = Vec{};
  auto partly = [&](long f) {
    Vec some = seen(f) ? load(s + f) : splat(-INFINITY);
    top = some > top ? some : top;
  };
  long f = from;
  if (from < begin) partly(f), f += VL;
  for (; f < whole; f += VL) top = load(s + f) > top ? load(s + f) : top;
  if (f < end) partly(f);
  float shift = scale * max(top);
  if (sink > shift) shift = sink;
  T* p = (T*)s;
  auto weigh = [&](long f, bool all) {
    Vec e = exp(scale * load(s + f) - shift);
    if (!all) e = seen(f) ? e : Vec{};
    mass += e;
    Elem<T>::store(p + f, e);
  };
  for (f = 0; f < from; f += VL) Elem<T>::store(p + f, Vec{});
  if (from < begin) weigh(f, false), f += VL;
  for (; f < whole; f += VL) weigh(f, true);
  if (f < end) weigh(f, false), f += VL;
  for (; f < cols; f += VL) Elem<T>::store(p + f, Vec{});
  total = sum(mass);
  if (sink > -INFINITY) total += expf(sink - shift);
  return shift;
}

}  // namespace headway
