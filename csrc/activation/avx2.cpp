// The activation quantizer, eight channels at a time; divides and rounds exactly as the scalar one does.
#include <immintrin.h>

#include <cmath>

#include "grid256.h"

namespace bitwright {

namespace {

inline int32_t reduce_add(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

}  // namespace

void quantize_avx2(const float* x, const Geometry& g, const Quantizer& q, const Activations& out, float* scratch,
                   int64_t first, int64_t last) {
  const int64_t normal = g.normal(), width = g.width();
  const float top = static_cast<float>((1 << q.bits) - 1);
  const __m256 tops = _mm256_set1_ps(top);
  for (int64_t token = first; token < last; ++token) {
    const float* row = in_site_order(x + token * g.columns, g.columns, q.order, scratch);
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), place = index * out.tokens + token;
      int8_t* codes = out.codes + place * width;
      const Range range = range256(values, channels);
      const Grid grid = grid_of(range, q, top);
      const float inside = clamped(grid.zero, top);
      const __m256 steps = _mm256_set1_ps(grid.step), zeros = _mm256_set1_ps(grid.zero);
      const __m256 insides = _mm256_set1_ps(inside);
      const __m256i keep = _mm256_set1_epi32(range.finite ? -1 : 0);
      __m256i sums = _mm256_setzero_si256();
      for (int64_t i = 0; i < width; i += 8) {
        __m256i code = _mm256_setzero_si256();
        if (i < channels) {
          const __m256i mask = lanes(channels - i);
          const __m256 v = i + 8 <= channels ? _mm256_loadu_ps(values + i) : _mm256_maskload_ps(values + i, mask);
          const __m256 c = _mm256_sub_ps(codes256(v, steps, zeros, tops), insides);
          code = _mm256_and_si256(_mm256_cvtps_epi32(c), _mm256_and_si256(mask, keep));
        }
        sums = _mm256_add_epi32(sums, code);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packs_epi16(words, words));
      }
      out.step[place] = range.finite ? grid.step : NAN;
      out.rest[place] = range.finite ? inside - grid.zero : 0.0f;
      out.shift[place] = -128 * reduce_add(sums);
    }
    quantize_outliers(row + normal, g, out, token);
  }
}

}  // namespace bitwright
