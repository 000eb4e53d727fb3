// grid.h with AVX2: the range of a group, eight channels at a time.
#pragma once
#include "../vector256.h"
#include "grid.h"

namespace bitwright {

BITWRIGHT_INLINE Range range256(const float* values, int64_t channels) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), largest_finite = _mm256_set1_epi32(0x7f7fffff);
  const __m256 first = _mm256_set1_ps(values[0]);
  __m256 lows = first, highs = first;
  __m256i odd = _mm256_setzero_si256();
  for (int64_t i = 0; i < channels; i += 8) {
    __m256 v;
    if (i + 8 <= channels) {
      v = _mm256_loadu_ps(values + i);
    } else {  // repeat the first value in the lanes beyond
      const __m256i mask = lanes(channels - i);
      v = _mm256_blendv_ps(first, _mm256_maskload_ps(values + i, mask), _mm256_castsi256_ps(mask));
    }
    lows = _mm256_min_ps(lows, v);
    highs = _mm256_max_ps(highs, v);
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), magnitude);
    odd = _mm256_or_si256(odd, _mm256_cmpgt_epi32(bits, largest_finite));
  }
  return {reduce_min(lows), reduce_max(highs), _mm256_testz_si256(odd, odd) != 0};
}

// round(v / step) + zero, cut to 0..top, as fp32 integers.
BITWRIGHT_INLINE __m256 codes256(__m256 v, __m256 step, __m256 zero, __m256 top) {
  const __m256 code = _mm256_round_ps(_mm256_div_ps(v, step), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(code, zero), _mm256_setzero_ps()), top);
}

}  // namespace bitwright
