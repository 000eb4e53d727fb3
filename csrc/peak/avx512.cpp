// The instruction of the product, over and over: vpdpbusd.
#include <immintrin.h>

#include "kernels.h"

namespace bitwright {

int64_t peak_avx512(int64_t rounds) {
  constexpr int kChains = 16;
  __m512i sums[kChains];
  const __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(2);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_setzero_si512();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) asm volatile("vpdpbusd %2,%1,%0" : "+v"(sums[i]) : "v"(w), "v"(x));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "v"(sums[i]));
  return rounds * kChains * 64;
}

}  // namespace bitwright
