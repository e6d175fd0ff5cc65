// A stable counting sort of (token, slot) pairs by (head, expert): see ../rows.py.
#include "tile.h"

extern "C" void headway_sort_rows_float32(const int64_t* index, long T, long H, long K, long E, int64_t* slot,
                                          int64_t* row, int64_t* counts, int) {
  // counts[H·E] collects the slots without an expert, which go to the end
  int64_t* next = (int64_t*)malloc((H * E + 1) * sizeof(int64_t));
  const auto key = [&](long n, long k) {
    const int64_t e = index[n * K + k];
    return e < E ? (n % H) * E + e : H * E;
  };
  memset(next, 0, (H * E + 1) * sizeof(int64_t));
  for (long n = 0; n < T * H; ++n)
    for (long k = 0; k < K; ++k) ++next[key(n, k)];
  memcpy(counts, next, H * E * sizeof(int64_t));
  int64_t start = 0;
  for (long g = 0; g <= H * E; ++g) {
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
