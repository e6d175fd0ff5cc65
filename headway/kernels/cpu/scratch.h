// Memory for intermediates: a buffer per thread, and slices of it.
#pragma once
#include <cstddef>
#include <cstdlib>

namespace headway {

constexpr long pad(long n, long to) { return (n + to - 1) / to * to; }

// A buffer of this thread that only grows: scratch costs page faults once.
static inline char* scratch(size_t bytes) {
  struct Block {
    char* at = nullptr;
    size_t size = 0;
    ~Block() { free(at); }
  };
  static thread_local Block block;
  if (block.size < bytes) {
    free(block.at);
    block.size = (bytes + 4095) / 4096 * 4096;
    block.at = (char*)aligned_alloc(64, block.size);
  }
  return block.at;
}

// Takes slices of a scratch buffer, each aligned to 64 bytes.
struct Slices {
  char* at = nullptr;
  size_t used = 0;
  template <class X>
  X* take(long n) {
    size_t here = used;
    used = pad(used + n * sizeof(X), 64);
    return at ? (X*)(at + here) : nullptr;
  }
};

}  // namespace headway
