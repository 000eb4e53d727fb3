#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

// Eight bfloat16 numbers as fp32: they are its upper halves.
inline __m256 widen(const uint16_t* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

inline float dot(const float* x, const uint16_t* w, int64_t columns) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 32 <= columns; i += 32) {
    for (int part = 0; part < 4; ++part) {
      sum[part] = _mm256_fmadd_ps(widen(w + i + part * 8), _mm256_loadu_ps(x + i + part * 8), sum[part]);
    }
  }
  for (; i + 8 <= columns; i += 8) sum[0] = _mm256_fmadd_ps(widen(w + i), _mm256_loadu_ps(x + i), sum[0]);
  const __m256 all = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
  __m128 low = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  low = _mm_add_ps(low, _mm_movehl_ps(low, low));
  float total = _mm_cvtss_f32(_mm_add_ss(low, _mm_movehdup_ps(low)));
  for (; i < columns; ++i) {
    const uint32_t bits = static_cast<uint32_t>(w[i]) << 16;
    float weight;
    std::memcpy(&weight, &bits, 4);
    total += weight * x[i];
  }
  return total;
}

}  // namespace

void dense_avx2(const float* x, int64_t tokens, const uint16_t* weights, int64_t rows, int64_t columns, float* y,
                int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t token = 0; token < tokens; ++token) {
      y[token * rows + row] = dot(x + token * columns, weights + row * columns, columns);
    }
  }
}

}  // namespace bitwright
