// The fast Walsh-Hadamard transform with AVX2: 64 values in eight registers, then up to three distances a pass. Dense
// factors: four rows of sums in registers, their entries added straight from the tables.
#include <immintrin.h>

#include "../decoder.h"
#include "../vector256.h"

namespace bitwright {

namespace {

#define ALWAYS inline __attribute__((always_inline))

// Butterflies of distance 1, 2, 4 inside a register: second halves negated and added to the swapped register.
ALWAYS __m256 inside(__m256 v) {
  const __m256 odd1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
  const __m256 odd2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
  const __m256 odd4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
  v = _mm256_add_ps(_mm256_permute_ps(v, 0xb1), _mm256_xor_ps(v, odd1));
  v = _mm256_add_ps(_mm256_permute_ps(v, 0x4e), _mm256_xor_ps(v, odd2));
  return _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, odd4));
}

template <int Count>
ALWAYS void butterflies(__m256 (&v)[Count]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < Count; distance *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      if (i & distance) continue;
      const __m256 a = v[i], b = v[i + distance];
      v[i] = _mm256_add_ps(a, b);
      v[i + distance] = _mm256_sub_ps(a, b);
    }
  }
}

// The first distances, up to 4 * Count, of 8 * Count values.
template <int Count>
ALWAYS void first_pass(const float* x, float* y, __m256 factor) {
  __m256 v[Count];
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) v[i] = inside(_mm256_mul_ps(_mm256_loadu_ps(x + i * 8), factor));
  butterflies(v);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) _mm256_storeu_ps(y + i * 8, v[i]);
}

// Distances stride, ..., stride * Count / 2.
template <int Count>
void pass(float* y, int64_t size, int64_t stride) {
  for (int64_t start = 0; start < size; start += stride * Count) {
    for (int64_t at = start; at < start + stride; at += 8) {
      __m256 v[Count];
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) v[i] = _mm256_loadu_ps(y + at + i * stride);
      butterflies(v);
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) _mm256_storeu_ps(y + at + i * stride, v[i]);
    }
  }
}

ALWAYS __m256 negative(__m256 v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }

// Vectors of 8 columns, the last of them under `mask`.
template <int Vectors>
void signed_sums(float* values, int64_t order, int64_t stride, __m256i mask, const uint8_t* signs, float* tables) {
  constexpr int64_t kColumns = kSignedColumns;
  const int64_t groups = order / 4;
  for (int64_t group = 0; group < groups; ++group) {
    for (int v = 0; v < Vectors; ++v) {
      __m256 x[4];
      for (int i = 0; i < 4; ++i) {
        const float* from = values + (group * 4 + i) * stride + v * 8;
        x[i] = v == Vectors - 1 ? _mm256_maskload_ps(from, mask) : _mm256_loadu_ps(from);
      }
      const __m256 both = _mm256_add_ps(x[0], x[1]), other = _mm256_add_ps(x[2], x[3]);
      const __m256 low[4] = {both, _mm256_sub_ps(x[1], x[0]), _mm256_sub_ps(x[0], x[1]), negative(both)};
      const __m256 high[4] = {other, _mm256_sub_ps(x[3], x[2]), _mm256_sub_ps(x[2], x[3]), negative(other)};
      float* table = tables + group * 16 * kColumns + v * 8;
#pragma GCC unroll 16
      for (int sign = 0; sign < 16; ++sign) {
        _mm256_store_ps(table + sign * kColumns, _mm256_add_ps(low[sign & 3], high[sign >> 2]));
      }
    }
  }
  constexpr int kRows = 4;
  for (int64_t row = 0; row < order; row += kRows) {
    const uint8_t* own = signs + row * groups;
    __m256 sum[kRows][Vectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm256_load_ps(tables + own[r * groups] + v * 8);
    }
    const float* table = tables;
    for (int64_t group = 1; group < groups; ++group) {
      table += 16 * kColumns;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const float* entry = table + own[r * groups + group];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm256_add_ps(sum[r][v], _mm256_load_ps(entry + v * 8));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* to = values + (row + r) * stride;
      for (int v = 0; v < Vectors - 1; ++v) _mm256_storeu_ps(to + v * 8, sum[r][v]);
      _mm256_maskstore_ps(to + (Vectors - 1) * 8, mask, sum[r][Vectors - 1]);
    }
  }
}

}  // namespace

void signed_sums_avx2(float* values, int64_t order, int64_t stride, int64_t width, const uint8_t* signs,
                      float* tables) {
  if (width > 8) {
    signed_sums<2>(values, order, stride, lanes(width - 8), signs, tables);
  } else {
    signed_sums<1>(values, order, stride, lanes(width), signs, tables);
  }
}

void hadamard_avx2(const float* x, float* y, int64_t blocks, int64_t size, float scale) {
  if (size < 8) return hadamard_scalar(x, y, blocks, size, scale);
  const __m256 factor = _mm256_set1_ps(scale);
  for (int64_t block = 0; block < blocks; ++block, x += size, y += size) {
    int64_t stride = smaller<int64_t>(size, 64);
    for (int64_t i = 0; i < size; i += stride) {
      if (stride == 64) {
        first_pass<8>(x + i, y + i, factor);
      } else if (stride == 32) {
        first_pass<4>(x + i, y + i, factor);
      } else if (stride == 16) {
        first_pass<2>(x + i, y + i, factor);
      } else {
        first_pass<1>(x + i, y + i, factor);
      }
    }
    while (stride < size) {
      if (size / stride >= 8) {
        pass<8>(y, size, stride);
        stride *= 8;
      } else if (size / stride == 4) {
        pass<4>(y, size, stride);
        stride *= 4;
      } else {
        pass<2>(y, size, stride);
        stride *= 2;
      }
    }
  }
}

}  // namespace bitwright
