// The activation quantizer, eight channels at a time; divides and rounds exactly as the scalar one does.
#include <immintrin.h>

#include <cmath>

#include "kernels.h"

namespace bitwright {

namespace {

inline float reduce_min(__m256 v) {
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
}

inline float reduce_max(__m256 v) {
  __m128 high = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  high = _mm_max_ps(high, _mm_movehl_ps(high, high));
  return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
}

inline int32_t reduce_add(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// Lanes of the last, shorter vector of a group.
inline __m256i lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

}  // namespace

void quantize_avx2(const float* x, const Geometry& g, const Quantizer& q, const Activations& out, float* scratch,
                   int64_t first, int64_t last) {
  const int64_t normal = g.normal(), width = g.width();
  const float top = static_cast<float>((1 << q.bits) - 1);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), largest_finite = _mm256_set1_epi32(0x7f7fffff);
  const __m256 zeros = _mm256_setzero_ps(), tops = _mm256_set1_ps(top);
  for (int64_t token = first; token < last; ++token) {
    const float* row = x + token * g.columns;
    if (q.order) {
      for (int64_t i = 0; i < g.columns; ++i) scratch[i] = row[q.order[i]];
      row = scratch;
    }
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), place = index * out.tokens + token;
      int8_t* codes = out.codes + place * width;
      __m256 lows = _mm256_set1_ps(values[0]), highs = lows;
      __m256i odd = _mm256_setzero_si256();
      for (int64_t i = 0; i < channels; i += 8) {
        __m256 v;
        if (i + 8 <= channels) {
          v = _mm256_loadu_ps(values + i);
        } else {  // repeat the first value in the lanes beyond
          const __m256i mask = lanes(channels - i);
          v = _mm256_blendv_ps(_mm256_set1_ps(values[0]), _mm256_maskload_ps(values + i, mask),
                               _mm256_castsi256_ps(mask));
        }
        lows = _mm256_min_ps(lows, v);
        highs = _mm256_max_ps(highs, v);
        const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), magnitude);
        odd = _mm256_or_si256(odd, _mm256_cmpgt_epi32(bits, largest_finite));
      }
      const bool finite = _mm256_testz_si256(odd, odd);
      float low = reduce_min(lows), high = reduce_max(highs);
      if (q.cut != 0.0f) {
        const float cut = (high - low) * q.cut;
        low += cut;
        high -= cut;
      }
      float step = (high - low) / top;
      step = step < kMinimumStep ? kMinimumStep : step;
      const float zero = -std::nearbyintf(low / step);
      const float inside = zero < 0.0f ? 0.0f : (zero > top ? top : zero);
      const __m256 steps = _mm256_set1_ps(step), zs = _mm256_set1_ps(zero), insides = _mm256_set1_ps(inside);
      const __m256i keep = _mm256_set1_epi32(finite ? -1 : 0);
      __m256i sums = _mm256_setzero_si256();
      for (int64_t i = 0; i < width; i += 8) {
        __m256i code = _mm256_setzero_si256();
        if (i < channels) {
          const __m256i mask = lanes(channels - i);
          const __m256 v = i + 8 <= channels ? _mm256_loadu_ps(values + i) : _mm256_maskload_ps(values + i, mask);
          __m256 c = _mm256_round_ps(_mm256_div_ps(v, steps), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          c = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(c, zs), zeros), tops);
          code = _mm256_and_si256(_mm256_cvtps_epi32(_mm256_sub_ps(c, insides)), _mm256_and_si256(mask, keep));
        }
        sums = _mm256_add_epi32(sums, code);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packs_epi16(words, words));
      }
      out.step[place] = finite ? step : NAN;
      out.rest[place] = finite ? inside - zero : 0.0f;
      out.shift[place] = -128 * reduce_add(sums);
    }
    quantize_outliers(row + normal, g, out, token);
  }
}

}  // namespace bitwright
