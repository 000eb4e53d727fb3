// Small things on vectors of eight floats that several AVX2 kernels need.
#pragma once
#include <immintrin.h>

#include "site.h"

namespace bitwright {

// All bits set in the first `count` lanes (none where it is negative): of the last, shorter vector.
BITWRIGHT_INLINE __m256i lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

BITWRIGHT_INLINE float reduce_min(__m256 v) {
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
}

BITWRIGHT_INLINE float reduce_max(__m256 v) {
  __m128 high = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  high = _mm_max_ps(high, _mm_movehl_ps(high, high));
  return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
}

// ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
BITWRIGHT_INLINE float reduce_add(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// exp(x) for x <= 88, with the coefficients of Cephes' expf. Below the range of normal numbers 0, as a masked score of
// -inf wants; there is no upper bound; NaN stays NaN.
BITWRIGHT_INLINE __m256 exponentials(__m256 x) {
  const __m256 lowest = _mm256_set1_ps(-87.3f), round = _mm256_set1_ps(12582912.0f);  // adding 1.5 * 2^23 rounds
  const __m256 none = _mm256_cmp_ps(x, lowest, _CMP_LT_OQ);
  x = _mm256_max_ps(lowest, x);  // in this order NaN stays NaN
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(1.44269504f), round), n = _mm256_sub_ps(shifted, round);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(none, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

}  // namespace bitwright
