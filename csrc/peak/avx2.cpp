// The instructions of the product for 128 weights, over and over: four vpmaddubsw, three additions, vpmaddwd, addition.
#include <immintrin.h>

#include "kernels.h"

namespace bitwright {

int64_t peak_avx2(int64_t rounds) {
  constexpr int kChains = 6;
  __m256i sums[kChains], w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(2);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 6
    for (int i = 0; i < kChains; ++i) {
      __m256i part[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        asm volatile("" : "+x"(x));  // another x for all that the compiler knows
        part[k] = _mm256_maddubs_epi16(w, x);
      }
      const __m256i all = _mm256_add_epi16(_mm256_add_epi16(part[0], part[1]), _mm256_add_epi16(part[2], part[3]));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(all, ones));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "x"(sums[i]));
  return rounds * kChains * 128;
}

}  // namespace bitwright
