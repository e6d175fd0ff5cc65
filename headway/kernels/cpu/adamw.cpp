// AdamW with moments stored in T: read, widened, updated in float32 and rounded back in one pass.
#include "sweep.h"

using namespace headway;

namespace {

template <class T>
void step(float* p, const float* grad, T* first, T* second, long size, float lr, float beta1, float beta2,
          float eps, float decay, float correct1, float correct2, float grad_scale, int threads) {
  const long chunk = 1 << 14;
  const float rate = lr / correct1, root = 1.f / sqrtf(correct2), keep = 1.f - lr * decay;
#pragma omp parallel for num_threads(threads) schedule(static) if (size > SMALL)
  for (long from = 0; from < size; from += chunk)
    sweep(size - from < chunk ? size - from : chunk, EACH {
      const long at = from + i;
      Vec g = get(grad + at, n) * grad_scale, m = get(first + at, n), v = get(second + at, n);
      m += (1.f - beta1) * (g - m);
      v = beta2 * v + (1.f - beta2) * g * g;
      put(p + at, keep * get(p + at, n) - rate * m / (square_root(v) * root + eps), n);
      put(first + at, m, n);
      put(second + at, v, n);
    });
}

}  // namespace

extern "C" {

#ifdef __AVX512BF16__
void headway_adamw_bfloat16(float* p, const float* grad, bf16* first, bf16* second, long size, float lr,
                            float beta1, float beta2, float eps, float decay, float correct1, float correct2,
                            float grad_scale, int threads) {
  step(p, grad, first, second, size, lr, beta1, beta2, eps, decay, correct1, correct2, grad_scale, threads);
}
#endif
}
