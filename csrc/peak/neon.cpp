// The instruction of the product, over and over: sdot.
#include <arm_neon.h>

#include "kernels.h"

namespace bitwright {

int64_t peak_neon(int64_t rounds) {
  constexpr int kChains = 16;
  int32x4_t sums[kChains];
  const int8x16_t w = vdupq_n_s8(3);
  int8x16_t x = vdupq_n_s8(2);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sums[i] = vdupq_n_s32(0);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      asm volatile("" : "+w"(x));  // another x for all that the compiler knows
      sums[i] = vdotq_s32(sums[i], w, x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "w"(sums[i]));
  return rounds * kChains * 16;
}

}  // namespace bitwright
