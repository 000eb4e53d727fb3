// The encoder of cache records, one value at a time: the oracle of the others, and bit for bit kv_cache.encode.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace bitwright {

void append_scalar(const float* states, int64_t stride, int64_t tokens, const Records& r, float cut,
                   uint8_t* records) {
  const float top = static_cast<float>((1 << r.bits) - 1);
  for (int64_t token = 0; token < tokens; ++token, states += stride, records += r.bytes()) {
    float low = kLargestHalf, high = -kLargestHalf;
    bool number = true;
    for (int64_t i = 0; i < r.head_dim; ++i) {
      const float x = states[i];
      low = x < low ? x : low;
      high = x > high ? x : high;
      number = number && x == x;
    }
    low = low < -kLargestHalf ? -kLargestHalf : low;
    high = high > kLargestHalf ? kLargestHalf : high;
    const Parameters p = parameters(low, high, top, cut, number);
    std::memset(records, 0, static_cast<size_t>(r.code_bytes()));
    for (int64_t i = 0; i < r.head_dim && number; ++i) {
      float x = states[i];
      x = x < -kLargestHalf ? -kLargestHalf : (x > kLargestHalf ? kLargestHalf : x);
      float code = std::nearbyintf((x - p.low) / p.scale);
      code = code < 0.0f ? 0.0f : (code > top ? top : code);
      const int64_t bit = i * r.bits;
      const int shifted = static_cast<int>(code) << bit % 8;
      uint8_t* to = records + bit / 8;
      to[0] = static_cast<uint8_t>(to[0] | shifted);
      if (shifted >> 8) to[1] = static_cast<uint8_t>(to[1] | shifted >> 8);
    }
    std::memcpy(records + r.code_bytes(), &p.halves, 4);
  }
}

}  // namespace bitwright
