// A router after its logits: selection, gates, statistics, and the gradient of the logits. The
// equations are in ../route.py.
//
// A block is VL tokens of one head, one in each lane. Chunks of blocks are fixed and their sums are
// added in order: the same bits on any number of threads.
#include <vector>

#include "lanes.h"

using namespace headway;

namespace {

enum Gate { TOPK_SOFTMAX, SOFTMAX_TOPK, SIGMOID };

struct Sizes {
  long T, H, E, K;
  long token, head;  // from a token's logits to the next token's, and to the next head's
  long gate, renormalize;
  float scale;
};

constexpr float TINY = 1e-20f;  // least divisor

// Scratch of a thread: [E][VL], of K in the last line, with whole squares to transpose.
struct Room {
  float *logit, *power, *score, *prob;
  int32_t *key, *counts;
  float *raw, *gate;
  int32_t* chosen;
  explicit Room(const Sizes& z) {
    const long e = pad(z.E, VL) * VL, k = pad(z.K, VL) * VL;
    float* at = (float*)scratch((6 * e + 3 * k) * sizeof(float));
    logit = at, power = at + e, score = at + 2 * e, prob = at + 3 * e;
    key = (int32_t*)(at + 4 * e), counts = (int32_t*)(at + 5 * e);
    raw = at + 6 * e, gate = raw + k, chosen = (int32_t*)(gate + k);
  }
};

// ---- one block of VL tokens of a head -----------------------------------------------------------

// raw[k]: the gates before they are renormalised and scaled; returns what divides them. `from` has
// logits (topk_softmax), scores (sigmoid) or exponentials (softmax_topk), whose sum is 1 / one.
INLINE Vec raw_gates(const Sizes& z, const float* from, Vec one, const int32_t* chosen,
                     float* raw) {
  Vec top = splat(-INFINITY), sum = {};
  for (long k = 0; k < z.K; ++k) {
    Vec v = take(from, chosen + k * VL);
    if (z.gate == SOFTMAX_TOPK) v *= one;
    store(raw + k * VL, v);
    top = v > top ? v : top;
    sum += v;
  }
  if (z.gate == TOPK_SOFTMAX) {
    sum = Vec{};
    for (long k = 0; k < z.K; ++k) {
      const Vec p = fading(load(raw + k * VL) - top);
      store(raw + k * VL, p);
      sum += p;
    }
    one = 1.f / sum, sum = Vec{};
    for (long k = 0; k < z.K; ++k) {
      const Vec p = load(raw + k * VL) * one;
      store(raw + k * VL, p);
      sum += p;
    }
  }
  return z.renormalize ? sum : splat(1.f);
}

// d[k], the gradient of the gates, becomes that of the raw gates, and of the chosen logits for
// topk_softmax.
INLINE void raw_gates_back(const Sizes& z, const float* raw, Vec by, float* d) {
  const Vec least = at_least(by, TINY), factor = z.scale / least;
  Vec dots = {};
  for (long k = 0; k < z.K; ++k) dots += load(raw + k * VL) * load(d + k * VL);
  const Vec less = z.renormalize ? (by < TINY ? Vec{} : dots / least) : Vec{};
  dots = Vec{};
  for (long k = 0; k < z.K; ++k) {
    const Vec v = (load(d + k * VL) - less) * factor;
    store(d + k * VL, v);
    dots += load(raw + k * VL) * v;
  }
  if (z.gate == TOPK_SOFTMAX)
    for (long k = 0; k < z.K; ++k)
      store(d + k * VL, load(raw + k * VL) * (load(d + k * VL) - dots));
}

// ---- all tokens ---------------------------------------------------------------------------------

long chunk_size(const Sizes& z) {
  const long even = pad((z.T + 63) / 64, 16);
  return even < 64 ? 64 : even;
}

// index and gates of n tokens in room.chosen and room.gate; adds to room.prob and returns the rest
// of the statistics. `replay` is null or the tokens' index.
INLINE Softmax forward_block(const Sizes& z, const Room& room, const float* bias,
                             const int64_t* replay, long n, Int live) {
  const bool sigmoid = z.gate == SIGMOID;
  Softmax s = softmax(room.logit, z.E, sigmoid ? nullptr : room.power);
  const float *score = room.logit, *part = room.power;  // part / sum = score, normalised
  if (sigmoid) {
    score = part = room.score;
    s.sum = sigmoids(room.logit, z.E, room.score);
    s.entropy = entropy_of(score, s.sum, at_least(s.sum, TINY), z.E);
  }
  const Vec one = 1.f / at_least(s.sum, TINY), kept = live ? one : Vec{};
  for (long e = 0; e < z.E; ++e) {
    float* prob = room.prob + e * VL;
    store(prob, load(prob) + load(part + e * VL) * kept);
  }
  if (replay) {
    get_chosen(replay, z.H * z.K, n, z.K, room.chosen);
  } else {
    keys(score, bias, z.E, room.key);
    select(room.key, z.E, z.K, room.chosen);
  }
  const float* from = z.gate == TOPK_SOFTMAX ? room.logit : part;
  const Vec by = at_least(raw_gates(z, from, one, room.chosen, room.raw), TINY);
  for (long k = 0; k < z.K; ++k) store(room.gate + k * VL, load(room.raw + k * VL) / by * z.scale);
  return s;
}

// sums: what a chunk adds for one head, prob [E], counts [E], lse², entropy.
void forward_chunk(const Sizes& z, const float* logits, const float* bias, const int64_t* replay,
                   long first, long last, long h, int64_t* index, float* gate, float* sums) {
  const Room room(z);
  const long row = z.H * z.K;
  memset(room.prob, 0, z.E * VL * sizeof(float));
  memset(room.counts, 0, z.E * sizeof(int32_t));
  Vec squares = {}, entropy = {};
  Int lane;
  for (int r = 0; r < VL; ++r) lane[r] = r;
  for (long t = first; t < last; t += VL) {
    const long n = last - t < VL ? last - t : VL, at = t * row + h * z.K;
    const Int live = lane < (int32_t)n;
    to_lanes(logits + t * z.token + h * z.head, z.token, n, z.E, room.logit);
    const Softmax s = forward_block(z, room, bias, replay ? replay + at : nullptr, n, live);
    squares += live ? s.lse * s.lse : Vec{};
    entropy += live ? s.entropy : Vec{};
    for (long r = 0; r < n; ++r)
      for (long k = 0; k < z.K; ++k) {
        const int32_t e = room.chosen[k * VL + r];
        index[at + r * row + k] = e;
        ++room.counts[e];
      }
    from_lanes(room.gate, n, z.K, gate + at, row);
  }
  for (long e = 0; e < z.E; ++e) {
    sums[e] = total(load(room.prob + e * VL));
    sums[z.E + e] = room.counts[e];
  }
  sums[2 * z.E] = total(squares), sums[2 * z.E + 1] = total(entropy);
}

// Σ over chunks, in order, of `forward_chunk`'s sums; means but for the counts.
void forward(const Sizes& z, const float* logits, const float* bias, const int64_t* replay,
             int64_t* index, float* gate, float* prob, float* squares, float* entropy,
             float* counts, int threads) {
  const long each = chunk_size(z), chunks = (z.T + each - 1) / each, W = 2 * z.E + 2;
  std::vector<float> sums(chunks * z.H * W);
#pragma omp parallel for num_threads(threads) schedule(static) if (z.T * z.H * z.E > SMALL)
  for (long i = 0; i < chunks * z.H; ++i) {
    const long first = i / z.H * each, last = first + each < z.T ? first + each : z.T;
    const float* own = bias + i % z.H * z.E;
    forward_chunk(z, logits, own, replay, first, last, i % z.H, index, gate, &sums[i * W]);
  }
  std::vector<double> all(z.H * W);
  for (long c = 0; c < chunks; ++c)
    for (long i = 0; i < z.H * W; ++i) all[i] += sums[c * z.H * W + i];
  const double share = 1. / (z.T ? z.T : 1);
  for (long h = 0; h < z.H; ++h) {
    const double* a = &all[h * W];
    for (long e = 0; e < z.E; ++e) {
      prob[h * z.E + e] = a[e] * share;
      counts[h * z.E + e] = a[z.E + e];
    }
    squares[h] = a[2 * z.E] * share;
    entropy[h] = a[2 * z.E + 1] * share / std::log(z.E < 2 ? 2. : z.E);
  }
}

// The gradient of the block's logits, [E][VL]. d_prob [E] and d_square are divided by T already.
INLINE const float* backward_block(const Sizes& z, const Room& room, bool d_gate,
                                   const float* d_prob, float d_square) {
  const bool sigmoid = z.gate == SIGMOID;
  float* part = sigmoid ? room.score : room.power;
  Vec one = {}, sum = {}, turn = {};  // the logsumexp adds turn·power
  if (d_square || z.gate == SOFTMAX_TOPK || (!sigmoid && d_prob)) {
    const Softmax s = softmax(room.logit, z.E, room.power);
    one = 1.f / s.sum, turn = d_square * 2.f * s.lse * one;
  } else {
    memset(room.power, 0, z.E * VL * sizeof(float));
  }
  if (sigmoid) sum = sigmoids(room.logit, z.E, part), one = 1.f / at_least(sum, TINY);
  Vec dots = {};  // Σ p·dp
  if (d_prob)
    for (long e = 0; e < z.E; ++e) dots += load(part + e * VL) * one * d_prob[e];
  if (d_gate) {
    const float* from = z.gate == TOPK_SOFTMAX ? room.logit : part;
    const Vec by = raw_gates(z, from, one, room.chosen, room.raw);
    raw_gates_back(z, room.raw, by, room.gate);
    for (long k = 0; z.gate == SOFTMAX_TOPK && k < z.K; ++k) {
      const Vec d = load(room.gate + k * VL) * load(room.raw + k * VL);
      store(room.gate + k * VL, d);
      dots += d;
    }
  }
  if (!sigmoid) {
    const Vec all = turn - dots * one;
    for (long e = 0; e < z.E; ++e) {
      const Vec d = d_prob ? all + d_prob[e] * one : all;
      store(part + e * VL, load(part + e * VL) * d);
    }
    if (d_gate) give(part, room.chosen, room.gate, z.K);
    return part;
  }
  float* d_score = room.prob;
  dots = sum < TINY ? Vec{} : dots;
  for (long e = 0; e < z.E; ++e) store(d_score + e * VL, d_prob ? (d_prob[e] - dots) * one : Vec{});
  if (d_gate) give(d_score, room.chosen, room.gate, z.K);
  for (long e = 0; e < z.E; ++e) {
    const Vec s = load(part + e * VL);
    store(part + e * VL, load(d_score + e * VL) * s * (1.f - s) + turn * load(room.power + e * VL));
  }
  return part;
}

void backward(const Sizes& z, const float* logits, const int64_t* index, const float* d_gate,
              const float* d_prob, const float* d_squares, float* d_logits, int threads) {
  const long each = chunk_size(z), chunks = (z.T + each - 1) / each, row = z.H * z.K;
  std::vector<float> d_mean(d_prob ? z.H * z.E : 0);
  for (size_t i = 0; i < d_mean.size(); ++i) d_mean[i] = d_prob[i] / z.T;
#pragma omp parallel for num_threads(threads) schedule(static) if (z.T * z.H * z.E > SMALL)
  for (long i = 0; i < chunks * z.H; ++i) {
    const long h = i % z.H, first = i / z.H * each;
    const long last = first + each < z.T ? first + each : z.T;
    const Room room(z);
    for (long t = first; t < last; t += VL) {
      const long n = last - t < VL ? last - t : VL, at = t * z.token + h * z.head;
      const long chosen = (t * z.H + h) * z.K;
      to_lanes(logits + at, z.token, n, z.E, room.logit);
      if (d_gate) {
        get_chosen(index + chosen, row, n, z.K, room.chosen);
        to_lanes(d_gate + chosen, row, n, z.K, room.gate);
      }
      const float* found =
          backward_block(z, room, d_gate, d_prob ? &d_mean[h * z.E] : nullptr,
                         d_squares ? d_squares[h] / z.T : 0.f);
      from_lanes(found, n, z.E, d_logits + at, z.token);
    }
  }
}

}  // namespace

extern "C" {

// Element e of token t and head h of logits and d_logits lies at t·token + h·head + e; the rest is
// contiguous. index, replay, gates, d_gate [T, H, K]; bias, prob, counts, d_prob [H, E]; squares,
// entropy, d_squares [H]. replay (an index to use in place of selecting) and gradients may be null.
void headway_route_float32(const float* logits, const float* bias, const int64_t* replay, long T,
                           long H, long E, long K, long token, long head, long gate,
                           long renormalize, float scale, float* gates, float* prob,
                           float* squares, float* entropy, float* counts, int64_t* index,
                           int threads) {
  const Sizes z = {T, H, E, K, token, head, gate, renormalize, scale};
  forward(z, logits, bias, replay, index, gates, prob, squares, entropy, counts, threads);
}

void headway_route_backward_float32(const float* logits, const int64_t* index, const float* d_gate,
                                    const float* d_prob, const float* d_squares, long T, long H,
                                    long E, long K, long token, long head, long gate,
                                    long renormalize, float scale, float* d_logits, int threads) {
  const Sizes z = {T, H, E, K, token, head, gate, renormalize, scale};
  backward(z, logits, index, d_gate, d_prob, d_squares, d_logits, threads);
}
}
