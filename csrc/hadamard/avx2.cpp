// The fast Walsh-Hadamard transform with AVX2: 64 values in eight registers, then up to three distances a pass.
#include <immintrin.h>

#include "../decoder.h"

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

}  // namespace

void hadamard_avx2(const float* x, float* y, int64_t blocks, int64_t size) {
  if (size < 8) return hadamard_scalar(x, y, blocks, size);
  const __m256 factor = _mm256_set1_ps(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(size))));
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
