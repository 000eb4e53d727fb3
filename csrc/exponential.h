// exp in fp32, without branches, so that compilers can work on vectors of it; the coefficients of Cephes' expf.
#pragma once
#include <cstring>

#include "site.h"

namespace bitwright {

constexpr float kExpLowest = -87.3f, kExpHighest = 88.3f, kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // ln 2 in two parts, products with integers exact
constexpr float kExp0 = 1.9875691500e-4f, kExp1 = 1.3981999507e-3f, kExp2 = 8.3334519073e-3f, kExp3 = 4.1665795894e-2f,
                kExp4 = 1.6666665459e-1f, kExp5 = 5.0000001201e-1f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer

// Within two units in the last place; below kExpLowest and above kExpHighest their values; NaN stays NaN.
BITWRIGHT_INLINE float exponential(float x) {
  x = x < kExpLowest ? kExpLowest : x;
  x = x > kExpHighest ? kExpHighest : x;
  const float shifted = x * kLog2E + kRound, n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = kExp0;
  p = p * r + kExp1;
  p = p * r + kExp2;
  p = p * r + kExp3;
  p = p * r + kExp4;
  p = p * r + kExp5;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);  // n stands in the low bits
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

}  // namespace bitwright
