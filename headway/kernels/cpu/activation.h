// Activations of vectors of float32 and their slopes, for experts and dense feed-forward networks.
#pragma once
#include "tile.h"

namespace headway {

enum Activation { SWIGLU, RELU2, GELU, SWIGLU_CLAMPED };

// Whether a hidden unit has two pre-activations, gate and up.
static constexpr bool is_gated(int activation) { return activation == SWIGLU || activation == SWIGLU_CLAMPED; }

// erf to 1.5e-7 (Abramowitz and Stegun 7.1.26), e = exp(-x²)
static INLINE Vec erf(Vec x, Vec e) {
  Vec size = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Vec y = 1.f - p * t * e;
  return x < 0.f ? -y : y;
}

// hid of one vector of hidden units and, with SLOPE, ∂hid/∂gate (or ∂hid/∂pre) and ∂hid/∂up.
template <bool SLOPE>
static INLINE Vec activate(int activation, Vec gate, Vec up, Vec& d_gate, Vec& d_up) {
  if (activation == SWIGLU) {
    Vec s = sigmoid(gate), silu = gate * s;
    if (SLOPE) d_up = silu, d_gate = up * (s + silu * (1.f - s));
    return silu * up;
  }
  if (activation == SWIGLU_CLAMPED) {  // NaN stays
    const float limit = 7.f, alpha = 1.702f;
    Vec g = gate > limit ? splat(limit) : gate;
    Vec u = up > limit ? splat(limit) : up < -limit ? splat(-limit) : up;
    Vec s = sigmoid(alpha * g), glu = g * s;
    if (SLOPE) {
      d_up = u == up ? glu : Vec{};
      d_gate = g == gate ? (u + 1.f) * (s + alpha * glu * (1.f - s)) : Vec{};
    }
    return (u + 1.f) * glu;
  }
  if (activation == RELU2) {
    Vec kept = gate < 0.f ? Vec{} : gate;  // NaN stays
    if (SLOPE) d_gate = 2.f * kept;
    return kept * kept;
  }
  Vec e = exp(gate * gate * -0.5f), cdf = 0.5f + 0.5f * erf(gate * 0.70710678f, e);
  if (SLOPE) d_gate = cdf + gate * e * 0.39894228f;
  return gate * cdf;
}

}  // namespace headway
