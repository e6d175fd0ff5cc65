// Rows in lanes: a vector holds one column of VL rows, so a step from column to column serves VL
// rows and nothing is summed across lanes. For rows too short to fill vectors of their own.
#pragma once
#include "sweep.h"

namespace headway {

// ---- rows to lanes ------------------------------------------------------------------------------

// out[e][r] = in[r][e] for r < n rows and e < E, zeros in the other lanes.
static void to_lanes(const float* in, long row, long n, long E, float* out) {
#ifdef HEADWAY_TRANSPOSES
  for (long e = 0; e < E; e += VL) {
    Int part[VL];
    for (long r = 0; r < VL; ++r)
      part[r] = r < n ? (Int)get(in + r * row + e, E - e < VL ? E - e : VL) : Int{};
    transpose(part, (Unit*)out + e * VL, VL);
  }
#else
  if (n < VL) memset(out, 0, E * VL * sizeof(float));
  for (long r = 0; r < n; ++r)
    for (long e = 0; e < E; ++e) out[e * VL + r] = in[r * row + e];
#endif
}

// out[r][e] = in[e][r] for r < n
static void from_lanes(const float* in, long n, long E, float* out, long row) {
#ifdef HEADWAY_TRANSPOSES
  for (long e = 0; e < E; e += VL) {
    Vec part[VL];
    transpose((const Int*)in + e, (Unit*)part, VL);
    for (long r = 0; r < n; ++r) put(out + r * row + e, part[r], E - e < VL ? E - e : VL);
  }
#else
  for (long r = 0; r < n; ++r)
    for (long e = 0; e < E; ++e) out[r * row + e] = in[e * VL + r];
#endif
}

// chosen[k][r] = index[r][k] for r < n, 0 in the other lanes.
static INLINE void get_chosen(const int64_t* index, long row, long n, long K, int32_t* chosen) {
  memset(chosen, 0, K * VL * sizeof(int32_t));
  for (long r = 0; r < n; ++r)
    for (long k = 0; k < K; ++k) chosen[k * VL + r] = (int32_t)index[r * row + k];
}

// from [E][VL] at every lane's own chosen row.
static INLINE Vec take(const float* from, const int32_t* chosen) {
  float some[VL];
  for (int r = 0; r < VL; ++r) some[r] = from[chosen[r] * VL + r];
  return load(some);
}

// Adds [K][VL] back to where each was taken from.
static INLINE void give(float* to, const int32_t* chosen, const float* from, long K) {
  for (long k = 0; k < K; ++k, chosen += VL, from += VL)
    for (int r = 0; r < VL; ++r) to[chosen[r] * VL + r] += from[r];
}

// ---- functions of vectors -----------------------------------------------------------------------

// The sigmoid of PyTorch's own vector code, bit for bit: 1 / (1 + e^−x) with the exponential of
// SLEEF (expf, 1.0 ulp). Another one would now and then choose another expert than the reference.
static INLINE Vec exact_sigmoid(Vec x) {
  const float magic = 12582912.f;  // as in exp
  Vec d = -x, n = d * 1.44269504f + magic - magic;
  Vec r = d - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Vec p = splat(1.98527618e-4f);
  p = p * r + 1.39304355e-3f;
  p = p * r + 8.33336078e-3f;
  p = p * r + 4.16664854e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 0.5f;
  p = 1.f + (r * r * p + r);
  const Int whole = __builtin_convertvector(n, Int), half = whole >> 1;  // 2^whole may overflow
  p = p * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
  p = d < -104.f ? Vec{} : p;
  p = d > 100.f ? splat(INFINITY) : p;
  return 1.f / (1.f + p);
}

// e^x for x ≤ 0, 0 where float32 ends.
static INLINE Vec fading(Vec x) { return x < -87.3f ? Vec{} : exp(x); }

// The natural logarithm to 1e-7 (Cephes' logf), for x ≥ 1.2e-38; NaN stays NaN.
static INLINE Vec log(Vec x) {
  const Int exponent = ((Int)x - 0x3f3504f3) >> 23;  // the rest lies between √½ and √2
  const Vec f = (Vec)((Int)x - (exponent << 23)) - 1.f, n = __builtin_convertvector(exponent, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec y = p * f * f * f - 2.12194440e-4f * n - 0.5f * f * f + f + 0.693359375f * n;
  return x == x ? y : x;
}

// NaN stays NaN.
static INLINE Vec at_least(Vec x, float least) { return x < least ? splat(least) : x; }

// ---- sums over the experts of every lane --------------------------------------------------------

struct Softmax {
  Vec sum, lse, entropy;  // Σ exp(logit − top), log Σ exp(logit), −Σ p·log p
};

// power[e] = exp(logit[e] − top) unless it is null
static INLINE Softmax softmax(const float* logit, long E, float* power) {
  Vec top = splat(-INFINITY), sum = {}, dots = {};
  for (long e = 0; e < E; ++e) {
    const Vec z = load(logit + e * VL);
    top = (z > top) | (z != z) ? z : top;
  }
  for (long e = 0; e < E; ++e) {
    const Vec below = load(logit + e * VL) - top, p = fading(below);
    if (power) store(power + e * VL, p);
    sum += p;
    dots += p > 0.f ? p * below : Vec{};
  }
  const Vec more = log(sum);
  return {sum, top - top == 0.f ? top + more : top, more - dots / sum};  // ±inf stays
}

// score[e] = σ(logit[e]); returns their sum.
static INLINE Vec sigmoids(const float* logit, long E, float* score) {
  Vec sum = {};
  for (long e = 0; e < E; ++e) {
    const Vec s = exact_sigmoid(load(logit + e * VL));
    store(score + e * VL, s);
    sum += s;
  }
  return sum;
}

// −Σ p·log p of p = score / by
static INLINE Vec entropy_of(const float* score, Vec sum, Vec by, long E) {
  Vec dots = {};
  for (long e = 0; e < E; ++e) {
    const Vec s = load(score + e * VL);
    dots += s < 1.2e-38f ? Vec{} : s * log(s);
  }
  return (sum * log(by) - dots) / by;
}

// ---- the k largest of every lane ----------------------------------------------------------------
// Integers in the order of score + bias, in which −0 ties with 0, NaN is largest and −inf ties with
// the lowest finite number, as in ../topk.py.
static INLINE void keys(const float* score, const float* bias, long E, int32_t* key) {
  const Int lowest = Int{} + (int32_t)0x80800000, most = Int{} + INT32_MAX;
  for (long e = 0; e < E; ++e) {
    const Vec s = load(score + e * VL) + bias[e] + 0.f;
    Int order = (Int)s ^ (((Int)s >> 31) & INT32_MAX);
    order = order < lowest ? lowest : order;
    *(Int*)(key + e * VL) = s == s ? order : most;
  }
}

// K rounds of the first largest key, each of which marks the last one's choice on its way.
static INLINE void select(int32_t* key, long E, long K, int32_t* chosen) {
  const Int taken = Int{} + INT32_MIN;  // below every key
  Int last = Int{} - 1;
  for (long k = 0; k < K; ++k) {
    Int best = taken, found = {};
    for (long e = 0; e < E; ++e) {
      const Int here = Int{} + (int32_t)e;
      const Int v = here == last ? taken : *(const Int*)(key + e * VL);
      *(Int*)(key + e * VL) = v;
      found = v > best ? here : found;
      best = v > best ? v : best;
    }
    *(Int*)(chosen + k * VL) = last = found;
  }
}

}  // namespace headway
