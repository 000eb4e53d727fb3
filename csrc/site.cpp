#include "site.h"

#include <cstring>

namespace bitwright {

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // a subnormal half is a multiple of 2^-24, exact in fp32
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

int32_t level_sum(const uint8_t* group, const Geometry& g, int64_t row, int64_t index) {
  const int64_t channels = g.channels(index);
  int32_t sum = 0;
  for (int64_t channel = 0; channel < channels; ++channel) sum += level_at(group, g, row, channel);
  return sum;
}

}  // namespace bitwright
