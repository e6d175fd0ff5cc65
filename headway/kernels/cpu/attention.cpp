// Causal softmax attention after FlashAttention-2. Of the S × S scores a core holds, at a time, the
// rows of a few queries (forward: 24 · S floats) or a tile (backward), twice in the backward.
//
// The equations and the meaning of every argument are in ../attention.py. B sequences · S positions ·
// N query heads · M key/value heads · d head width, even for bfloat16. Scores, softmax and sums are
// float32; P and dS are rounded to T, the dtype of the matmuls. One work item owns all that it
// writes and goes through it in a fixed order, so the bits do not depend on the number of threads.
//
// A window or documents exclude keys on the left: query i sees keys first[i] … i, and `first` never
// falls from one query to the next. So what is seen is a band, and only its blocks are computed:
//
//     keys →  0 1 2 3 4 5 6 7
//     query 0 ■ . . . . . . .     forward: a block of queries starts at the first key that its first
//           1 ■ ■ . . . . . .     query sees (queries 4 and 5: at key 3), rounded down to a vector
//           2 . ■ ■ . . . . .
//           3 . . . ■ . . . .     backward: a tile of keys ends after the last query that sees one of
//           4 . . . ■ ■ . . .     them (keys 2 and 3: after query 4)
//           5 . . . . ■ ■ . .
//           6 . . . . . ■ ■ .     (a window of 2; a document begins at 3)
#include "softmax.h"

using namespace headway;

namespace {

// Small where the diagonal cuts: half of its block is computed in vain.
constexpr long QUERIES = 24;  // forward: rows of scores at a time, each over all the keys it sees
constexpr long KEYS = 32, SEEN_BY = 256;  // backward: a tile of keys × queries that see them
static_assert(KEYS % VL == 0 && SEEN_BY % VL == 0, "tiles begin at a whole vector of queries");

struct Shape {
  long B, S, N, M, d;
  long dp = pad(d, VL);
  // Row of a matrix over positions. An odd number of vectors: with a power of two all rows would
  // fall into the same few sets of the first-level cache.
  long wide = pad(S, VL) | VL;
};

// Asks for the lines of a row that is needed `SOON` rows later: those of one head lie so far apart
// that the hardware does not see the pattern, and each would be waited for.
constexpr long SOON = 16;
template <bool WRITE, class T>
INLINE void ask(const T* row, long n) {
  for (long l = 0; l < n; l += 64 / (long)sizeof(T)) __builtin_prefetch(row + l, WRITE);
}

// out = factor · in, n elements, in T; `in` is padded to VL.
template <class T>
INLINE void narrow(const float* in, float factor, long n, T* out) {
  long l = 0;
  for (; l + VL <= n; l += VL) Elem<T>::store(out + l, factor * load(in + l));
  if (l < n) put<T>(out + l, factor * load(in + l), n - l);
}

// The same for `rows` rows.
template <class T>
void narrow_rows(const float* in, float factor, long rows, long n, T* out, long out_row) {
  for (long r = 0; r < rows; ++r, in += pad(n, VL), out += out_row) {
    if (r + SOON < rows) ask<true>(out + SOON * out_row, n);
    narrow(in, factor, n, out);
  }
}

template <class T>
INLINE float inner(const T* a, const T* b, long n) {
  Vec whole = Vec{};
  long l = 0;
  for (; l + VL <= n; l += VL) whole += Elem<T>::load(a + l) * Elem<T>::load(b + l);
  if (l < n) whole += get(a + l, n - l) * get(b + l, n - l);
  return sum(whole);
}

// One query head of one sequence. `first` is null where causality alone decides.
template <class T>
void forward(const T* q, const T* k, const T* v, const int32_t* first, const Shape& s, float scale, T* out,
             float* lse) {
  constexpr int PER = Elem<T>::PER;
  const long q_row = s.N * s.d, kv_row = s.M * s.d, units = s.d / PER;
  Unit *keys, *values;
  float *score, *y, total[QUERIES];
  Slices a;
  for (int pass = 0; pass < 2; ++pass) {
    keys = a.take<Unit>(units * s.wide), values = a.take<Unit>(pad(s.S, PER) / PER * s.dp);
    score = a.take<float>(QUERIES * s.wide), y = a.take<float>(QUERIES * s.dp);
    if (!pass) a = {scratch(a.used)};
  }
  pack_columns<T>(k, kv_row, s.S, s.d, keys, s.wide);
  pack_rows<T>(v, kv_row, s.S, s.d, values, s.dp);
  for (long at = 0; at < s.S; at += QUERIES) {
    const long n = s.S - at < QUERIES ? s.S - at : QUERIES, seen = at + n;
    const long from = first ? first[at] / VL * VL : 0, cols = pad(seen, VL) - from;
    const Unit* q_at = (const Unit*)(q + at * q_row);
    product<T>(n, cols, units, q_at, q_row / PER, 1, keys + from, s.wide, score, s.wide);
    for (long r = 0; r < n; ++r) {
      const long begin = first ? first[at + r] - from : 0, end = at + r + 1 - from;
      const float shift = softmax<T>(score + r * s.wide, begin, end, cols, scale, total[r]);
      lse[at + r] = shift + logf(total[r]);
    }
    const Unit* values_at = values + from / PER * s.dp;
    product<T>(n, s.dp, pad(seen - from, PER) / PER, (Unit*)score, s.wide, 1, values_at, s.dp, y, s.dp);
    for (long r = 0; r < n; ++r) narrow(y + r * s.dp, 1.f / total[r], s.d, out + (at + r) * q_row);
  }
}

// One key/value head of one sequence and the query heads that share it, in their order.
template <class T>
void backward(const T* q, const T* k, const T* v, const int32_t* first, const T* out, const T* d_out,
              const float* lse, const Shape& s, float scale, T* dq, T* dk, T* dv) {
  constexpr int PER = Elem<T>::PER;
  constexpr long WIDE = SEEN_BY | VL;
  const long q_row = s.N * s.d, kv_row = s.M * s.d, units = s.d / PER, pairs = pad(s.S, PER) / PER;
  Unit *k_rows, *q_cols, *do_cols, *q_rows, *do_rows, *ds;
  float *lse_S, *delta_S, *dq_S, *dk_S, *dv_S, *p, *dp;
  int32_t* first_S;
  Slices a;
  for (int pass = 0; pass < 2; ++pass) {
    k_rows = a.take<Unit>(pairs * s.dp);
    q_cols = a.take<Unit>(units * s.wide), do_cols = a.take<Unit>(units * s.wide);
    q_rows = a.take<Unit>(pairs * s.dp), do_rows = a.take<Unit>(pairs * s.dp);
    lse_S = a.take<float>(s.wide), delta_S = a.take<float>(s.wide);
    dq_S = a.take<float>(s.S * s.dp), dk_S = a.take<float>(s.S * s.dp), dv_S = a.take<float>(s.S * s.dp);
    p = a.take<float>(KEYS * WIDE), dp = a.take<float>(KEYS * WIDE);
    ds = PER == 1 ? (Unit*)dp : a.take<Unit>(KEYS / PER * WIDE);
    first_S = a.take<int32_t>(s.wide);
    if (!pass) a = {scratch(a.used)};
  }
  pack_rows<T>(k, kv_row, s.S, s.d, k_rows, s.dp);
  if (first)  // past the end no query sees a key
    for (long i = 0; i < pad(s.S, VL); ++i) first_S[i] = i < s.S ? first[i] : INT32_MAX;
  for (long h = 0; h < s.N / s.M; ++h, q += s.d, out += s.d, d_out += s.d, dq += s.d, lse += s.S) {
    pack_columns<T>(q, q_row, s.S, s.d, q_cols, s.wide);
    pack_columns<T>(d_out, q_row, s.S, s.d, do_cols, s.wide);
    pack_rows<T>(q, q_row, s.S, s.d, q_rows, s.dp);
    pack_rows<T>(d_out, q_row, s.S, s.d, do_rows, s.dp);
    for (long i = 0; i < pad(s.S, VL); ++i) {  // past the end P and dS are finite and meet zeros
      if (i + SOON < s.S) ask<false>(out + (i + SOON) * q_row, s.d);
      lse_S[i] = i < s.S ? lse[i] : 0.f;
      delta_S[i] = i < s.S ? inner(out + i * q_row, d_out + i * q_row, s.d) : 0.f;
    }
    if (first) memset(dq_S, 0, s.S * s.dp * sizeof(float));  // the first tile of a query may be any
    long end = first ? 0 : s.S;                              // of the queries that see the tile
    for (long key = 0; key < s.S; key += KEYS) {
      const long nk = s.S - key < KEYS ? s.S - key : KEYS;
      while (end < s.S && first[end] < key + nk) ++end;
      for (long query = key; query < end; query += SEEN_BY) {
        const long nq = end - query < SEEN_BY ? end - query : SEEN_BY;
        const long cols = pad(nq, VL), nq_units = pad(nq, PER) / PER;
        const bool add = h > 0 || query > key, bounded = first && first_S[query + cols - 1] > key;
        const Unit* k_at = (const Unit*)(k + key * kv_row);
        const Unit* v_at = (const Unit*)(v + key * kv_row);
        product<T>(nk, cols, units, k_at, kv_row / PER, 1, q_cols + query, s.wide, p, WIDE);
        product<T>(nk, cols, units, v_at, kv_row / PER, 1, do_cols + query, s.wide, dp, WIDE);
        auto differentiate = [&](auto masked) {  // P and dS in place of p and dp
          for (long r = 0; r < nk; r += PER)
            for (long f = 0; f < cols; f += VL) {
              Vec slope[2] = {Vec{}, Vec{}};
              for (int i = 0; i < PER && r + i < nk; ++i) {
                const long at = (r + i) * WIDE;
                Vec e = exp(scale * load(p + at + f) - load(lse_S + query + f));
                slope[i] = e * (load(dp + at + f) - load(delta_S + query + f));
                if (query == key && f < r + i) {
                  const Int seen = lanes() >= (int)(r + i - f);
                  e = seen ? e : Vec{}, slope[i] = seen ? slope[i] : Vec{};
                }
                if (masked) {
                  const Int seen = *(Int*)(first_S + query + f) <= (int)(key + r + i);
                  e = seen ? e : Vec{}, slope[i] = seen ? slope[i] : Vec{};
                }
                Elem<T>::store((T*)(p + at) + f, e);  // in place: T is no wider than float
                Elem<T>::store((T*)(dp + at) + f, slope[i]);
              }
              if (PER == 2) *(Int*)(ds + r / PER * WIDE + f) = units_of<T>(slope[0], slope[1]);
            }
        };
        bounded ? differentiate(std::true_type{}) : differentiate(std::false_type{});
        const long in_k = key / PER * s.dp, in_q = query / PER * s.dp, of_k = key * s.dp;
        product<T>(nk, s.dp, nq_units, (Unit*)p, WIDE, 1, do_rows + in_q, s.dp, dv_S + of_k, s.dp, add);
        product<T>(nk, s.dp, nq_units, (Unit*)dp, WIDE, 1, q_rows + in_q, s.dp, dk_S + of_k, s.dp, add);
        product<T>(nq, s.dp, pad(nk, PER) / PER, ds, 1, WIDE, k_rows + in_k, s.dp, dq_S + query * s.dp,
                   s.dp, first || key > 0);
      }
    }
    narrow_rows(dq_S, scale, s.S, s.d, dq, q_row);
  }
  narrow_rows(dk_S, scale, s.S, s.d, dk, kv_row);
  narrow_rows(dv_S, 1.f, s.S, s.d, dv, kv_row);
}

template <class T>
void run_forward(const T* q, const T* k, const T* v, const int32_t* first, const Shape& s, float scale,
                 T* out, float* lse, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long i = 0; i < s.B * s.N; ++i) {
    const long b = i / s.N, n = i % s.N, from = (b * s.S * s.N + n) * s.d;
    const long kv = (b * s.S * s.M + n / (s.N / s.M)) * s.d;
    const int32_t* first_S = first ? first + b * s.S : nullptr;
    forward(q + from, k + kv, v + kv, first_S, s, scale, out + from, lse + i * s.S);
  }
}

template <class T>
void run_backward(const T* q, const T* k, const T* v, const int32_t* first, const T* out, const T* d_out,
                  const float* lse, const Shape& s, float scale, T* dq, T* dk, T* dv, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long i = 0; i < s.B * s.M; ++i) {
    const long b = i / s.M, m = i % s.M, group = s.N / s.M;
    const long from = (b * s.S * s.N + m * group) * s.d, kv = (b * s.S * s.M + m) * s.d;
    const int32_t* first_S = first ? first + b * s.S : nullptr;
    backward(q + from, k + kv, v + kv, first_S, out + from, d_out + from, lse + i * group * s.S, s, scale,
             dq + from, dk + kv, dv + kv);
  }
}

}  // namespace

extern "C" {

#define HEADWAY_ATTENTION(T, name)                                                                       \
  void headway_attention_forward_##name(const T* q, const T* k, const T* v, const int32_t* first, long B,\
                                        long S, long N, long M, long d, float scale, T* out, float* lse, \
                                        int threads) {                                                   \
    run_forward<T>(q, k, v, first, Shape{B, S, N, M, d}, scale, out, lse, threads);                      \
  }                                                                                                      \
  void headway_attention_backward_##name(const T* q, const T* k, const T* v, const int32_t* first,       \
                                         const T* out, const T* d_out, const float* lse, long B, long S, \
                                         long N, long M, long d, float scale, T* dq, T* dk, T* dv,       \
                                         int threads) {                                                  \
    run_backward<T>(q, k, v, first, out, d_out, lse, Shape{B, S, N, M, d}, scale, dq, dk, dv, threads);  \
  }

HEADWAY_ATTENTION(float, float32)
#ifdef __AVX512BF16__
HEADWAY_ATTENTION(bf16, bfloat16)
#endif
}
