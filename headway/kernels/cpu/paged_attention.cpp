// Attention over a cache in pages of 16 positions: the new tokens of many sequences in one call.
//
// The meaning of every argument is in ../paged_attention.py. N query heads · M key/value heads · d, v widths of
// a key and of a value. T is the dtype of the products; scores, softmax and sums are float32. Keys and values
// of one head in one page lie together, each as the register tile reads them:
//
//     [ keys: units of d × 16 positions ][ values: units of 16 positions × v, padded to VL ]
//
// Values that are the first v dims of their keys (latent attention) are not stored: NR·VL columns of them at a
// time are turned round for all rows of a block, which share them.
//
// What a query gives does not depend on who shares the pass or on how its sequence was cut: scores are sums
// over d in order; the softmax adds key j in lane j mod VL, in order; the values are added over keys in order
// of position. Keys that a query does not see have the weight 0, and adding 0 changes no bit; values that no
// token of the sequence has written yet (the end of its last page) are read as zeros.
#include <vector>

#include "rotate.h"
#include "softmax.h"

using namespace headway;

namespace {

constexpr long PAGE = 16;  // positions
// Rows of scores at a time; more where keys are turned round for them. Those of one query stay together.
constexpr long ROWS = 24, SHARED_ROWS = 96;
constexpr long PER_PAGE = PAGE / VL;  // vectors of keys
constexpr long COLUMNS = NR * VL;     // of values at a time

template <class T>
struct Layout {
  static constexpr int PER = Elem<T>::PER;
  long d, v;
  bool shared;  // values are the first dims of keys
  long units = pad(d, PER) / PER, vp = pad(v, VL);
  long keys = units * PAGE, head = keys + (shared ? 0 : PAGE / PER * vp);  // units
};

struct Segment {
  int64_t row, n, start;  // first row of the pass, rows, position of the first
};

struct Strides {
  long q, k, v;  // elements from a token to the next
};

// What happens to queries and keys first: RMSNorm of a head, where there is a weight, then the rotation of
// pairs (i, i + half); nothing without tables.
struct Rotation {
  const float *q_weight, *k_weight, *cos, *sin;
  float eps;
  template <class T>
  INLINE void turn(const T* x, const float* weight, long row, long d, T* out) const {
    if (!cos) return (void)memcpy(out, x, d * sizeof(T));
    const float *c = cos + row * (d / 2), *s = sin + row * (d / 2);
    if (!weight) return turn_row<false>(x, weight, 1.f, c, s, 1.f, d / 2, out);
    turn_row<true>(x, weight, scale_of(x, d, eps), c, s, 1.f, d / 2, out);
  }
};

// ---- writing ------------------------------------------------------------------------------------

template <class T>
void write(const T* k, const T* v, long slot, const Layout<T>& s, Unit* page) {
  T *keys = (T*)page, *values = (T*)(page + s.keys);
  constexpr int PER = Elem<T>::PER;
  for (long i = 0; i < s.d; ++i) keys[(i / PER * PAGE + slot) * PER + i % PER] = k[i];
  if (s.d % PER) keys[(s.d / PER * PAGE + slot) * PER + 1] = {};  // the half of a pair
  if (!s.shared)
    for (long i = 0; i < s.v; ++i) values[(slot / PER * s.vp + i) * PER + slot % PER] = v[i];
}

// ---- products with pages ------------------------------------------------------------------------

// C [M, N·VL] = A [M, units] · N vectors of keys, each with its own address.
template <class T, int M, int N>
__attribute__((noinline)) void score_tile(long units, const Unit* a, long a_row, const Unit* const* b, float* c,
                                          long c_row) {
  Vec acc[M][N];
  const Unit* at[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) at[j] = b[j];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = Vec{};
  for (long u = 0; u < units; ++u, ++a)
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i][j] = dot<T>(acc[i][j], a[i * a_row], at[j] + u * PAGE);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * VL, acc[i][j]);
}

// C [M, N·VL] = Σ over pages in order of A [M, keys] · values
template <class T, int M, int N>
__attribute__((noinline)) void value_tile(long pages, const Unit* a, long a_row, const Unit* const* page,
                                          long column, long b_row, float* c, long c_row) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) acc[i][j] = Vec{};
  for (long p = 0; p < pages; ++p) {
    const Unit* b = page[p] + column;
    for (long u = 0; u < PAGE / Elem<T>::PER; ++u, ++a, b += b_row)
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] = dot<T>(acc[i][j], a[i * a_row], b + j * VL);
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * VL, acc[i][j]);
}

#ifdef __AVX512F__
#define HEADWAY_WIDTHS(F, M) F(M, 1) F(M, 2) F(M, 3) F(M, 4)
#else
#define HEADWAY_WIDTHS(F, M) F(M, 1) F(M, 2)
#endif
#define HEADWAY_TILES(F) \
  HEADWAY_WIDTHS(F, 1) HEADWAY_WIDTHS(F, 2) HEADWAY_WIDTHS(F, 3) HEADWAY_WIDTHS(F, 4) HEADWAY_WIDTHS(F, 5) HEADWAY_WIDTHS(F, 6)

// All rows against all keys of the pages.
template <class T>
void scores(long rows, long units, const Unit* a, const std::vector<const Unit*>& page, float* c, long c_row) {
  const long vectors = page.size() * PER_PAGE;
  const Unit* b[NR];
  for (long j = 0; j < vectors; j += NR) {
    const long n = vectors - j < NR ? vectors - j : NR;
    for (long i = 0; i < n; ++i) b[i] = page[(j + i) / PER_PAGE] + (j + i) % PER_PAGE * VL;
    for (long r = 0; r < rows; r += MR) {
      const long m = rows - r < MR ? rows - r : MR;
      switch (m * 8 + n) {
#define HEADWAY_CASE(M, N) \
  case M * 8 + N: score_tile<T, M, N>(units, a + r * units, units, b, c + r * c_row + j * VL, c_row); break;
        HEADWAY_TILES(HEADWAY_CASE)
#undef HEADWAY_CASE
      }
    }
  }
}

// C [rows, n·VL] = A [rows, keys] · n vectors of values from `column` on, whose rows are `b_row` apart.
template <class T>
void sum_columns(long rows, const Unit* a, long a_row, const std::vector<const Unit*>& page, long column, long n,
                 long b_row, float* c, long c_row) {
  for (long r = 0; r < rows; r += MR) {
    const long m = rows - r < MR ? rows - r : MR;
    switch (m * 8 + n) {
#define HEADWAY_CASE(M, N)                                                                                   \
  case M * 8 + N:                                                                                            \
    value_tile<T, M, N>(page.size(), a + r * a_row, a_row, page.data(), column, b_row, c + r * c_row, c_row); \
    break;
      HEADWAY_TILES(HEADWAY_CASE)
#undef HEADWAY_CASE
    }
  }
}

// ---- one block of queries of one sequence and one key/value head ------------------------------------

template <class T>
struct Block {
  const T* q;  // of the first query and the first of `group` query heads
  T* out;
  long n, group, position;  // queries, query heads, position of the first query
  long q_row, out_row;      // elements from a query to the next
  const int32_t* table;     // pages of the sequence
  const Unit* cache;        // of the head, in page 0
  long page_size;           // units from a page to the next
  const float* sink;        // of the first query head, or null
  long window;
  float scale;
  const Rotation& rotation;
  long row;  // of the first query, in the pass
};

// The addresses of the keys and of the values of a block, kept for the next one.
struct Pages {
  std::vector<const Unit*> keys, values;
};

// Copies the first `n` positions of a page's values, zeros behind them.
template <class T>
void begin_of(const Unit* values, long n, const Layout<T>& s, Unit* out) {
  constexpr int PER = Elem<T>::PER;
  memset(out, 0, PAGE / PER * s.vp * sizeof(Unit));
  memcpy(out, values, n / PER * s.vp * sizeof(Unit));
  if (n % PER)  // the first of a pair
    for (long i = 0; i < s.v; ++i) ((T*)out)[(n / PER * s.vp + i) * PER] = ((const T*)values)[(n / PER * s.vp + i) * PER];
}

// Columns j … j + COLUMNS − 1 of the first `n` keys of a page as values, [PAGE / PER][COLUMNS], zeros behind them.
template <class T>
void turn_keys(const Unit* keys, long j, long n, const Layout<T>& s, Unit* out) {
  constexpr int PER = Elem<T>::PER;
#ifdef __AVX512F__
  const Int seen = lanes() < (int)n;
  for (long c = 0; c < COLUMNS; c += VL * PER) {
    const long first = (j + c) / PER;
    Int unit[VL];
    for (long i = 0; i < VL; ++i) unit[i] = first + i < s.units ? *(const Int*)(keys + (first + i) * PAGE) & seen : Int{};
    if constexpr (PER == 1) transpose(unit, out + c, COLUMNS);
#ifdef __AVX512BF16__
    if constexpr (PER == 2) {  // pairs of dims of a position become pairs of positions
      Int row[PAGE];
      transpose(unit, (Unit*)row, VL);
      // dim i of the even and of the odd position: 16-bit elements i and 32 + i of the two
      const __m512i low = (__m512i)(lanes() | (lanes() + 32) << 16), high = low + (__m512i)(Int{} + 0x00100010);
      for (int u = 0; u < PAGE / 2; ++u) {
        const __m512i even = (__m512i)row[2 * u], odd = (__m512i)row[2 * u + 1];
        _mm512_storeu_si512(out + u * COLUMNS + c, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(out + u * COLUMNS + c + VL, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
#endif
  }
#else
  for (long at = 0; at < PAGE; ++at)
    for (long c = 0; c < COLUMNS; ++c) {
      const bool seen = at < n && j + c < s.d;
      ((T*)out)[(at / PER * COLUMNS + c) * PER + at % PER] =
          seen ? ((const T*)keys)[((j + c) / PER * PAGE + at) * PER + (j + c) % PER] : T{};
    }
#endif
}

template <class T>
void attend(const Block<T>& b, const Layout<T>& s, Pages& page) {
  constexpr int PER = Elem<T>::PER;
  const long last = b.position + b.n - 1, rows = b.n * b.group;
  const long first = b.window && b.position >= b.window ? b.position - b.window + 1 : 0;
  const long base = first / PAGE * PAGE, keys = (last / PAGE + 1) * PAGE - base, wide = keys | VL;
  page.keys.clear(), page.values.clear();
  for (long p = base / PAGE; p <= last / PAGE; ++p) {
    page.keys.push_back(b.cache + b.table[p] * b.page_size);
    page.values.push_back(page.keys.back() + s.keys);
  }
  T* q;
  Unit* some;  // values that do not lie in the pages as they are read
  float *score, *y, *total;
  Slices a;
  for (int pass = 0; pass < 2; ++pass) {
    q = a.take<T>(rows * s.units * PER), score = a.take<float>(rows * wide), y = a.take<float>(rows * s.vp);
    total = a.take<float>(rows);
    some = a.take<Unit>(s.shared ? keys / PER * COLUMNS : PAGE / PER * s.vp);
    if (!pass) a = {scratch(a.used)};
  }
  for (long r = 0; r < rows; ++r) {
    T* to = q + r * s.units * PER;
    memset(to + s.units * PER - PER, 0, PER * sizeof(T));
    const T* from = b.q + r / b.group * b.q_row + r % b.group * s.d;
    b.rotation.turn(from, b.rotation.q_weight, b.row + r / b.group, s.d, to);
  }
  scores<T>(rows, s.units, (Unit*)q, page.keys, score, wide);
  for (long r = 0; r < rows; ++r) {
    const long at = b.position + r / b.group, from = b.window && at >= b.window ? at - b.window + 1 : 0;
    const float sink = b.sink ? b.sink[r % b.group] : -INFINITY;
    softmax<T>(score + r * wide, from - base, at + 1 - base, keys, b.scale, total[r], sink);
  }
  const long n_pages = page.keys.size(), written = last % PAGE + 1;  // of the last page
  if (!s.shared && written < PAGE) {
    begin_of(page.values.back(), written, s, some);
    page.values.back() = some;
  }
  for (long j = 0; j < s.vp; j += COLUMNS) {
    const long n = (s.vp - j) / VL < NR ? (s.vp - j) / VL : NR;
    for (long p = 0; s.shared && p < n_pages; ++p) {
      page.values[p] = some + p * (PAGE / PER * COLUMNS);
      turn_keys(page.keys[p], j, p + 1 < n_pages ? PAGE : written, s, (Unit*)page.values[p]);
    }
    sum_columns<T>(rows, (Unit*)score, wide, page.values, s.shared ? 0 : j, n, s.shared ? COLUMNS : s.vp, y + j, s.vp);
  }
  for (long r = 0; r < rows; ++r) {
    T* to = b.out + r / b.group * b.out_row + r % b.group * s.v;
    const float factor = 1.f / total[r];
    for (long l = 0; l < s.v; l += VL)
      put(to + l, factor * load(y + r * s.vp + l), s.v - l < VL ? s.v - l : VL);
  }
}

// ---- a pass -------------------------------------------------------------------------------------

template <class T>
void run(const T* q, const T* k, const T* v, const Strides& strides, const Segment* segment, const int32_t* table,
         long R, long P, long N, long M, const Layout<T>& s, long window, float scale, const float* sink,
         const Rotation& rotation, Unit* cache, T* out, int threads) {
  const long group = N / M, page_size = M * s.head, most = s.shared ? SHARED_ROWS : ROWS;
  const long each = group < most ? most / group : 1;  // queries
  struct Item {
    long r, first;
  };
  std::vector<Item> items;
  for (long r = 0; r < R; ++r)
    for (long i = 0; i < segment[r].n; i += each) items.push_back({r, i});
  const long n_items = items.size(), n_tokens = segment[R - 1].row + segment[R - 1].n;
#pragma omp parallel num_threads(threads) if (n_tokens * N > 64)
  {
    Pages page;
#pragma omp for schedule(static)
    for (long i = 0; i < R * M; ++i) {  // one writer per head of a sequence: its pages in order
      const long r = i / M, m = i % M;
      for (long t = 0; t < segment[r].n; ++t) {
        const long at = segment[r].start + t, row = segment[r].row + t;
        Unit* to = cache + table[r * P + at / PAGE] * page_size + m * s.head;
        T* key = (T*)scratch(s.d * sizeof(T));
        rotation.turn(k + row * strides.k + m * s.d, rotation.k_weight, row, s.d, key);
        write(key, v + row * strides.v + m * s.v, at % PAGE, s, to);
      }
    }
#pragma omp for schedule(dynamic)
    for (long i = 0; i < n_items * M; ++i) {
      const long m = i / n_items, r = items[i % n_items].r, first = items[i % n_items].first;
      const long row = segment[r].row + first, left = segment[r].n - first;
      const Block<T> b = {
          q + row * strides.q + m * group * s.d, out + (row * N + m * group) * s.v,
          left < each ? left : each, group, segment[r].start + first, strides.q, N * s.v,
          table + r * P, cache + m * s.head, page_size, sink ? sink + m * group : nullptr,
          window, scale, rotation, row};
      attend(b, s, page);
    }
  }
}

}  // namespace

extern "C" {

#define HEADWAY_PAGED(T, name)                                                                              \
  long headway_paged_units_##name(long d, long v, long shared) { return Layout<T>{d, v, !!shared}.head; }   \
  void headway_paged_attention_##name(                                                                      \
      const T* q, const T* k, const T* v, long q_row, long k_row, long v_row, const int64_t* segments,      \
      const int32_t* table, long R, long P, long N, long M, long d, long n_v, long window, float scale,     \
      const float* sink, const float* q_weight, const float* k_weight, const float* cos, const float* sin,  \
      float eps, Unit* cache, T* out, int threads) {                                                        \
    const Rotation rotation = {q_weight, k_weight, cos, sin, eps};                                          \
    run<T>(q, k, v, {q_row, k_row, v_row}, (const Segment*)segments, table, R, P, N, M, Layout<T>{d, n_v, !v}, \
           window, scale, sink, rotation, cache, out, threads);                                             \
  }

HEADWAY_PAGED(float, float32)
#ifdef __AVX512BF16__
HEADWAY_PAGED(bf16, bfloat16)
#endif
}
