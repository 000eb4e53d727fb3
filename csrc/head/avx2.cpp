#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

// Eight codes as fp32, four-bit ones 2^28 times as large: each lane moves its nibble to the top, where the sign is.
template <int kBits>
inline __m256 decode(const uint8_t* p) {
  if (kBits == 8) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m256i up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
  return _mm256_cvtepi32_ps(
      _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(word), up), _mm256_set1_epi32(static_cast<int>(0xF0000000u))));
}

inline float sum_of(__m256 t) {
  __m128 low = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  low = _mm_add_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_add_ss(low, _mm_movehdup_ps(low)));
}

// Rows row..row + kRows of tokens token..token + kTokens. Several rows keep the multiplier busy while a sum waits for
// its last addition; several tokens share the decoding.
template <int kBits, int kRows, int kTokens>
inline void block(const HeadRows& w, const float* x, float* y, int64_t row, int64_t token) {
  const uint8_t* codes[kRows];
  for (int r = 0; r < kRows; ++r) codes[r] = w.codes + (row + r) * w.row_bytes();
  const float* inputs = x + token * w.columns;
  const int64_t groups = w.groups();
  const float unit = w.unit();
  __m256 total[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) total[r][t] = _mm256_setzero_ps();
  }
  for (int64_t group = 0; group < groups; ++group) {
    __m256 sum[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm256_setzero_ps();
    }
    int64_t i = group * w.group;
    const int64_t end = smaller(w.columns, i + w.group);
    for (; i + 8 <= end; i += 8) {
      __m256 values[kTokens];
      for (int t = 0; t < kTokens; ++t) values[t] = _mm256_loadu_ps(inputs + t * w.columns + i);
      for (int r = 0; r < kRows; ++r) {
        const __m256 weights = decode<kBits>(codes[r] + i * kBits / 8);
        for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm256_fmadd_ps(weights, values[t], sum[r][t]);
      }
    }
    if (i < end) {  // the last channels, filled up with zeros, which leave sums as they are
      const size_t left = static_cast<size_t>(end - i);
      for (int r = 0; r < kRows; ++r) {
        uint8_t bytes[8] = {};
        std::memcpy(bytes, codes[r] + i * kBits / 8, (left * kBits + 7) / 8);
        if (kBits == 4 && left % 2) bytes[left / 2] &= 15;
        const __m256 weights = decode<kBits>(bytes);
        for (int t = 0; t < kTokens; ++t) {
          float values[8] = {};
          std::memcpy(values, inputs + t * w.columns + i, left * 4);
          sum[r][t] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(values), sum[r][t]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const __m256 scale = _mm256_set1_ps(_cvtsh_ss(w.scales[(row + r) * groups + group]) * unit);
      for (int t = 0; t < kTokens; ++t) total[r][t] = _mm256_fmadd_ps(sum[r][t], scale, total[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) y[(token + t) * w.rows + row + r] = sum_of(total[r][t]);
  }
}

template <int kBits>
void rows(const HeadRows& w, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) {
    int64_t row = first;
    for (; row + 2 <= last; row += 2) block<kBits, 2, 4>(w, x, y, row, token);
    if (row < last) block<kBits, 1, 4>(w, x, y, row, token);
  }
  for (; token < tokens; ++token) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) block<kBits, 4, 1>(w, x, y, row, token);
    for (; row < last; ++row) block<kBits, 1, 1>(w, x, y, row, token);
  }
}

}  // namespace

void head_avx2(const HeadRows& w, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
  (w.bits == 8 ? rows<8> : rows<4>)(w, x, tokens, y, first, last);
}

}  // namespace bitwright
