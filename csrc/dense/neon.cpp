#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

void dense_neon(const float* x, int64_t tokens, const uint16_t* weights, int64_t rows, int64_t columns, float* y,
                int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const uint16_t* w = weights + row * columns;
    for (int64_t token = 0; token < tokens; ++token) {
      const float* from = x + token * columns;
      float32x4_t even = vdupq_n_f32(0.0f), odd = even;
      int64_t i = 0;
      for (; i + 8 <= columns; i += 8) {  // bfloat16 numbers are the upper halves of fp32
        const uint16x8_t words = vld1q_u16(w + i);
        even = vfmaq_f32(even, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)), vld1q_f32(from + i));
        odd = vfmaq_f32(odd, vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(words), 16)), vld1q_f32(from + i + 4));
      }
      float sum = vaddvq_f32(vaddq_f32(even, odd));
      for (; i < columns; ++i) {
        const uint32_t bits = static_cast<uint32_t>(w[i]) << 16;
        float weight;
        std::memcpy(&weight, &bits, 4);
        sum += weight * from[i];
      }
      y[token * rows + row] = sum;
    }
  }
}

}  // namespace bitwright
