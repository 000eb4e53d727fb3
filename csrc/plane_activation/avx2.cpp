// The activation quantizer with bit planes, eight channels at a time; every operation as in the scalar one.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "../planes/kernels.h"
#include "../activation/kernels.h"

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

// ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
inline float reduce_add(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Lanes of the last, shorter vector of a group.
inline __m256i lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct Range {
  float low, high;
  bool finite;
};

inline Range range_of(const float* values, int64_t channels) {
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

}  // namespace

void quantize_planes_avx2(const float* x, const Geometry& g, const PlaneQuantizer& q, const PlaneActivations& out,
                          float* scratch, int64_t first, int64_t last) {
  const PlaneLayout layout(g);
  const float top = 15.0f;
  const __m256 nothing = _mm256_setzero_ps(), unit = _mm256_set1_ps(1.0f), tops = _mm256_set1_ps(top);
  for (int64_t token = first; token < last; ++token) {
    const float* row = x + token * g.columns;
    if (q.order) {
      for (int64_t i = 0; i < g.columns; ++i) scratch[i] = row[q.order[i]];
      row = scratch;
    }
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), place = index * out.tokens + token;
      uint16_t* words = out.words + place * layout.lines * 2;
      uint8_t* ones = out.ones + place * layout.parts * kPlanes;
      std::memset(words, 0, static_cast<size_t>(layout.lines * 4));
      std::memset(ones, 0, static_cast<size_t>(layout.parts * kPlanes));
      Range range = range_of(values, channels);
      if (!range.finite) {
        for (int plane = 0; plane < kPlanes; ++plane) out.scales[place * kPlanes + plane] = NAN;
        out.offset[place] = NAN;
        continue;
      }
      if (q.cut != 0.0f) {
        const float cut = (range.high - range.low) * q.cut;
        range.low += cut;
        range.high -= cut;
      }
      float step = (range.high - range.low) / top;
      step = step < kMinimumStep ? kMinimumStep : step;
      const float zero = -std::nearbyintf(range.low / step);
      const __m256 steps = _mm256_set1_ps(step), zeros = _mm256_set1_ps(zero);
      __m256 totals[kPlanes] = {nothing, nothing, nothing, nothing};
      int32_t counts[kPlanes] = {};
      for (int64_t i = 0; i < channels; i += 8) {
        const __m256i mask = lanes(channels - i);
        const __m256 v = i + 8 <= channels ? _mm256_loadu_ps(values + i) : _mm256_maskload_ps(values + i, mask);
        __m256 code = _mm256_round_ps(_mm256_div_ps(v, steps), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        code = _mm256_min_ps(_mm256_max_ps(_mm256_add_ps(code, zeros), nothing), tops);
        const __m256 error = _mm256_sub_ps(v, _mm256_mul_ps(steps, _mm256_sub_ps(code, zeros)));
        const __m256 share = _mm256_div_ps(error, _mm256_max_ps(code, unit));
        const __m256i bits = _mm256_and_si256(_mm256_cvtps_epi32(code), mask);
        unsigned low_word = 0, high_word = 0;
        uint8_t* part = ones + i / (8 * kPartLines) * kPlanes;
        for (int plane = 0; plane < kPlanes; ++plane) {
          const __m256i sign = _mm256_slli_epi32(bits, 31 - plane);  // the bit in the sign of its lane
          const unsigned found = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(sign)));
          low_word |= (found & 15) << (4 * plane);
          high_word |= (found >> 4) << (4 * plane);
          const int count = __builtin_popcount(found);
          part[plane] = static_cast<uint8_t>(part[plane] + count);
          counts[plane] += count;
          const __m256 chosen = _mm256_castsi256_ps(_mm256_srai_epi32(sign, 31));
          totals[plane] = _mm256_add_ps(totals[plane], _mm256_and_ps(share, chosen));
        }
        words[i / 4] = static_cast<uint16_t>(low_word);
        words[i / 4 + 1] = static_cast<uint16_t>(high_word);
      }
      for (int plane = 0; plane < kPlanes; ++plane) {
        float free_scale = step;
        if (q.balance != Balance::none) {
          const int64_t over = q.balance == Balance::literal ? channels : (counts[plane] < 1 ? 1 : counts[plane]);
          free_scale = step + reduce_add(totals[plane]) / static_cast<float>(over);
        }
        out.scales[place * kPlanes + plane] = static_cast<float>(1 << plane) * free_scale;
      }
      out.offset[place] = -step * zero;
    }
    quantize_outliers(row + g.normal(), g, out.outliers, token);
  }
}

}  // namespace bitwright
