// What all encoders of cache records share.
#pragma once
#include <cstring>

#include "../decoder.h"

namespace bitwright {

constexpr float kLargestHalf = 65504.0f;

// fp32 -> fp16, to nearest, ties to even; |value| at most kLargestHalf or NaN.
BITWRIGHT_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7e00u;
  uint32_t kept, dropped, half_way;
  if (bits >= 0x38800000u) {  // 2^-14 and above: normal in fp16
    kept = (bits - 0x38000000u) >> 13;
    dropped = bits & 0x1fffu;
    half_way = 0x1000u;
  } else {  // a multiple of 2^-24
    const uint32_t exponent = bits >> 23;
    if (exponent < 102) return static_cast<uint16_t>(sign);
    const uint32_t shift = 126 - exponent;
    const uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    kept = mantissa >> shift;
    dropped = mantissa & ((1u << shift) - 1u);
    half_way = 1u << (shift - 1);
  }
  if (dropped > half_way || (dropped == half_way && (kept & 1u))) ++kept;
  return static_cast<uint16_t>(sign | kept);
}

// Scale and minimum of a record, as stored and as read back.
struct Parameters {
  uint16_t halves[2];  // scale, minimum
  float scale, low;
};

// Of values low..high, which are finite, without the share `cut` at either end; a NaN among the states makes the record
// NaN.
BITWRIGHT_INLINE Parameters parameters(float low, float high, float top, float cut, bool number) {
  Parameters p;
  if (cut != 0.0f) {
    const float off = (high - low) * cut;
    low += off;
    high -= off;
  }
  p.halves[1] = number ? float_to_half(low) : 0x7e00u;
  if (p.halves[1] == 0x8000u) p.halves[1] = 0;  // one zero, whichever of the two the smallest value was
  p.low = half_to_float(p.halves[1]);
  float scale = (high - p.low) / top;
  scale = scale < 6e-8f ? 6e-8f : scale;
  p.halves[0] = number ? float_to_half(scale) : 0x7e00u;
  p.scale = half_to_float(p.halves[0]);
  return p;
}

}  // namespace bitwright
