// What the AVX2 and the AVX-512 product share: all that follows the counting, eight rows to a register.
//
// A file that includes this gives a type `Counter`:
//     static void prepare(const uint8_t* codes, int64_t lines, uint8_t* prepared)   once a group of 32 rows
//     static void count(const uint8_t* codes, const uint8_t* prepared, int64_t lines, const uint16_t* words,
//                       Counts[kPlanes])                                            once a token and part
#pragma once
#include <cstring>

#include "kernels.h"

namespace bitwright {

// How many channels of a part have 1 in an input plane and in q, in m, in both: one byte a row, byte_of_row.
struct Counts {
  __m256i q, m, both;
};

BITWRIGHT_INLINE __m256i load_line(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Adds the sums of levels over the ones of a plane, 32 rows: counts of the four codes times their levels.
BITWRIGHT_INLINE void add_levels(const Counts& c, uint8_t ones, const uint8_t* levels, __m256i sums[4]) {
  const __m256i one = _mm256_set1_epi16(1);
  const __m256i n1 = _mm256_sub_epi8(c.q, c.both), n2 = _mm256_sub_epi8(c.m, c.both);
  const __m256i n0 = _mm256_sub_epi8(_mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(ones)), c.q), n2);
  const __m256i low01 = _mm256_unpacklo_epi8(n0, n1), high01 = _mm256_unpackhi_epi8(n0, n1);
  const __m256i low23 = _mm256_unpacklo_epi8(n2, c.both), high23 = _mm256_unpackhi_epi8(n2, c.both);
  const __m256i n[4] = {_mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
                        _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
  for (int r = 0; r < 4; ++r) {
    // The four counts add up to 128 at most: two products stay within 128 * 128 and fit 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16(n[r], load_line(levels + r * 32));
    sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, one));
  }
}

BITWRIGHT_INLINE __m256 scales_of(const uint8_t* group, int r) {
  const uint8_t* halves = group + PlaneLayout::kScales + r * 16;
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

BITWRIGHT_INLINE __m256 level_sums_of(const uint8_t* group, int64_t parts, int r) {
  __m256i sum = _mm256_setzero_si256();
  for (int64_t part = 0; part < parts; ++part) {
    const uint8_t* at = group + PlaneLayout::kSums + part * kTileRows * 2 + r * 16;
    sum = _mm256_add_epi32(sum, _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
  }
  return _mm256_cvtepi32_ps(sum);
}

// Outliers, bias and the store of eight rows; only `rows` of them exist.
BITWRIGHT_INLINE void finish_rows(__m256 f, const uint8_t* tile, const PlaneLayout& layout, const Geometry& g,
                                  const Activations& a, int64_t token, int r, const float* bias, float* y,
                                  int64_t rows) {
  if (g.outliers) {
    const int8_t* codes = a.outliers + token * g.outlier_width();
    __m256i low = _mm256_setzero_si256(), high = low;  // rows 0-3 and 4-7, two sums each
    for (int64_t channel = 0; channel < g.outlier_width(); channel += 4) {
      const __m256i w = load_line(tile + layout.outliers_at + channel * 32 + r * 32);
      int four;
      std::memcpy(&four, codes + channel, 4);
      const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(w)), x));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(w, 1)), x));
    }
    // hadd works inside lanes: put the quarters back in order.
    const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    const __m256i total = _mm256_add_epi32(sum, _mm256_set1_epi32(a.outlier_shift[token]));
    const __m256 scale = _mm256_loadu_ps(reinterpret_cast<const float*>(tile + layout.outlier_scales_at) + r * 8);
    f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(scale, _mm256_set1_ps(a.outlier_step[token])), f);
  }
  if (rows >= 8) {
    if (bias) f = _mm256_add_ps(f, _mm256_loadu_ps(bias));
    _mm256_storeu_ps(y, f);
    return;
  }
  alignas(32) float values[8];
  _mm256_store_ps(values, f);
  for (int64_t i = 0; i < rows; ++i) y[i] = bias ? values[i] + bias[i] : values[i];
}

// One tile and up to kTokenBlock tokens: a group is prepared once in the cache and meets every token there.
template <typename Counter>
BITWRIGHT_INLINE void multiply_tile(const uint8_t* tile, const PlaneLayout& layout, const Geometry& g,
                                    const PlaneActivations& a, const float* bias, float* y, uint8_t* scratch,
                                    int64_t first, int64_t tokens, int64_t rows) {
  float* f = reinterpret_cast<float*>(scratch);
  uint8_t* prepared = scratch + kTokenBlock * kTileRows * 4;
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    alignas(32) float scales[kTileRows], level_sums[kTileRows];
    for (int r = 0; r < 4; ++r) {
      _mm256_store_ps(scales + r * 8, scales_of(group, r));
      _mm256_store_ps(level_sums + r * 8, level_sums_of(group, layout.parts, r));
    }
    Counter::prepare(group + layout.codes_at, layout.lines, prepared);
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t at = index * a.tokens + first + token;
      const uint16_t* words = a.words + at * layout.lines * 2;
      __m256i sums[kPlanes][4];
      for (int plane = 0; plane < kPlanes; ++plane) {
        for (int r = 0; r < 4; ++r) sums[plane][r] = _mm256_setzero_si256();
      }
      for (int64_t part = 0; part < layout.parts; ++part) {
        const int64_t line = part * kPartLines, count = smaller(kPartLines, layout.lines - line);
        Counts counts[kPlanes];
        Counter::count(group + layout.codes_at + line * 64, prepared + line * Counter::kPreparedBytes, count,
                       words + line * 2, counts);
        const uint8_t* ones = a.ones + (at * layout.parts + part) * kPlanes;
        for (int plane = 0; plane < kPlanes; ++plane) {
          add_levels(counts[plane], ones[plane], group + PlaneLayout::kLevels, sums[plane]);
        }
      }
      const float* mu = a.scales + at * kPlanes;
      for (int r = 0; r < 4; ++r) {
        __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[0][r]), _mm256_broadcast_ss(mu));
        for (int plane = 1; plane < kPlanes; ++plane) {
          t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[plane][r]), _mm256_broadcast_ss(mu + plane), t);
        }
        t = _mm256_fmadd_ps(_mm256_load_ps(level_sums + r * 8), _mm256_broadcast_ss(a.offset + at), t);
        float* out = f + token * kTileRows + r * 8;
        _mm256_storeu_ps(out, _mm256_fmadd_ps(t, _mm256_load_ps(scales + r * 8), _mm256_loadu_ps(out)));
      }
    }
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int r = 0; r < 4 && r * 8 < rows; ++r) {
      finish_rows(_mm256_loadu_ps(f + token * kTileRows + r * 8), tile, layout, g, a.outliers, first + token, r,
                  bias ? bias + r * 8 : nullptr, y + (first + token) * g.rows + r * 8, rows - r * 8);
    }
  }
}

template <typename Counter>
BITWRIGHT_INLINE void multiply_tiles(const uint8_t* weights, const Geometry& g, const PlaneActivations& a,
                                     const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t last) {
  const PlaneLayout layout(g);
  for (int64_t t = first; t < last; ++t) {
    const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
    for (int64_t token = 0; token < a.tokens; token += kTokenBlock) {
      multiply_tile<Counter>(weights + t * layout.bytes, layout, g, a, bias ? bias + row : nullptr, y + row, scratch,
                             token, smaller(kTokenBlock, a.tokens - token), rows);
    }
  }
}

}  // namespace bitwright
