// The gated activation, eight values at a time.
#include "../decoder.h"
#include "../vector256.h"

namespace bitwright {

namespace {

// exp(-v) is taken where it is at most 88: below v = -88 the silu is 0 in fp32 but for what underflows.
BITWRIGHT_INLINE __m256 gate256(__m256 v, __m256 up) {
  const __m256 minus = _mm256_sub_ps(_mm256_setzero_ps(), v);
  const __m256 e = exponentials(_mm256_min_ps(_mm256_set1_ps(88.0f), minus));  // in this order NaN stays NaN
  return _mm256_mul_ps(_mm256_div_ps(v, _mm256_add_ps(_mm256_set1_ps(1.0f), e)), up);
}

}  // namespace

void gate_avx2(const float* gate, const float* up, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(y + i, gate256(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
  }
  if (i < count) {
    const __m256i mask = lanes(count - i);
    _mm256_maskstore_ps(y + i, mask, gate256(_mm256_maskload_ps(gate + i, mask), _mm256_maskload_ps(up + i, mask)));
  }
}

}  // namespace bitwright
