// The activation quantizer with bit planes, eight channels at a time; every operation as in the scalar one.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "../planes/kernels.h"
#include "../activation/grid256.h"

namespace bitwright {

void quantize_planes_avx2(const float* x, const Geometry& g, const PlaneQuantizer& q, const PlaneActivations& out,
                          float* scratch, int64_t first, int64_t last) {
  const PlaneLayout layout(g);
  const float top = 15.0f;
  const __m256 nothing = _mm256_setzero_ps(), unit = _mm256_set1_ps(1.0f), tops = _mm256_set1_ps(top);
  for (int64_t token = first; token < last; ++token) {
    const float* row = in_site_order(x + token * g.columns, g.columns, q.order, scratch);
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), place = index * out.tokens + token;
      uint16_t* words = out.words + place * layout.lines * 2;
      uint8_t* ones = out.ones + place * layout.parts * kPlanes;
      std::memset(words, 0, static_cast<size_t>(layout.lines * 4));
      std::memset(ones, 0, static_cast<size_t>(layout.parts * kPlanes));
      const Range range = range256(values, channels);
      if (!range.finite) {
        for (int plane = 0; plane < kPlanes; ++plane) out.scales[place * kPlanes + plane] = NAN;
        out.offset[place] = NAN;
        continue;
      }
      const Grid grid = grid_of(range, q.cut, top);
      const __m256 steps = _mm256_set1_ps(grid.step), zeros = _mm256_set1_ps(grid.zero);
      __m256 totals[kPlanes] = {nothing, nothing, nothing, nothing};
      int32_t counts[kPlanes] = {};
      for (int64_t i = 0; i < channels; i += 8) {
        const __m256i mask = lanes(channels - i);
        const __m256 v = i + 8 <= channels ? _mm256_loadu_ps(values + i) : _mm256_maskload_ps(values + i, mask);
        const __m256 code = codes256(v, steps, zeros, tops);
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
        float free_scale = grid.step;
        if (q.balance != Balance::none) {
          const int64_t over = q.balance == Balance::literal ? channels : (counts[plane] < 1 ? 1 : counts[plane]);
          free_scale = grid.step + reduce_add(totals[plane]) / static_cast<float>(over);
        }
        out.scales[place * kPlanes + plane] = static_cast<float>(1 << plane) * free_scale;
      }
      out.offset[place] = -grid.step * grid.zero;
    }
    quantize_outliers(row + g.normal(), g, out.outliers, token);
  }
}

}  // namespace bitwright
