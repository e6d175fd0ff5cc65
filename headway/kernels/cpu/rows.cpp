// A stable counting sort of (token, slot) pairs by (head, expert): see ../permute.py.
#include "tile.h"

extern "C" void headway_sort_rows_float32(const int64_t* index, long T, long H, long K, long E, int64_t* slot,
                                          int64_t* row, int64_t* counts, int) {
  // slots without an expert go to the end, by head
  const long keys = H * E + H;
  int64_t* next = (int64_t*)malloc(keys * sizeof(int64_t));
  const auto key = [&](long n, long k) {
    const int64_t e = index[n * K + k];
    return e >= 0 && e < E ? (n % H) * E + e : H * E + n % H;
  };
  memset(next, 0, keys * sizeof(int64_t));
  for (long n = 0; n < T * H; ++n)
    for (long k = 0; k < K; ++k) ++next[key(n, k)];
  memcpy(counts, next, H * E * sizeof(int64_t));
  int64_t start = 0;
  for (long g = 0; g < keys; ++g) {
    const int64_t size = next[g];
    next[g] = start, start += size;
  }
  for (long n = 0; n < T * H; ++n)
    for (long k = 0; k < K; ++k) {
      const int64_t r = next[key(n, k)]++;
      slot[r] = n * K + k, row[n * K + k] = r;
    }
  free(next);
}
