// The activation quantizer with NEON, four channels at a time; divides and rounds exactly as the scalar one does.
#include <arm_neon.h>

#include <cmath>

#include "grid.h"

namespace bitwright {

void quantize_neon(const float* x, const Geometry& g, const Quantizer& q, const Activations& out, float* scratch,
                   int64_t first, int64_t last) {
  const int64_t normal = g.normal(), width = g.width();
  const float top = static_cast<float>((1 << q.bits) - 1);
  const float32x4_t zeros = vdupq_n_f32(0.0f), tops = vdupq_n_f32(top);
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffffu), largest_finite = vdupq_n_u32(0x7f7fffffu);
  for (int64_t token = first; token < last; ++token) {
    const float* row = in_site_order(x + token * g.columns, g.columns, q.order, scratch);
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), whole = channels / 4 * 4, place = index * out.tokens + token;
      int8_t* codes = out.codes + place * width;
      float32x4_t lows = vdupq_n_f32(values[0]), highs = lows;
      uint32x4_t odd = vdupq_n_u32(0);
      for (int64_t i = 0; i < whole; i += 4) {
        const float32x4_t v = vld1q_f32(values + i);
        lows = vminq_f32(lows, v);
        highs = vmaxq_f32(highs, v);
        odd = vorrq_u32(odd, vcgtq_u32(vandq_u32(vreinterpretq_u32_f32(v), magnitude), largest_finite));
      }
      Range range{vminvq_f32(lows), vmaxvq_f32(highs), vmaxvq_u32(odd) == 0};
      widen(range, values, whole, channels);
      const Grid grid = grid_of(range, q, top);
      const float inside = clamped(grid.zero, top);
      const float32x4_t steps = vdupq_n_f32(grid.step), zs = vdupq_n_f32(grid.zero), insides = vdupq_n_f32(inside);
      int32_t sum = 0;
      if (range.finite) {
        for (int64_t i = 0; i < whole; i += 4) {
          float32x4_t code = vaddq_f32(vrndnq_f32(vdivq_f32(vld1q_f32(values + i), steps)), zs);
          code = vminq_f32(vmaxq_f32(code, zeros), tops);
          const int32x4_t integers = vcvtq_s32_f32(vsubq_f32(code, insides));
          sum += vaddvq_s32(integers);
          const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(integers), vdup_n_s16(0)));
          vst1_lane_s32(reinterpret_cast<int32_t*>(codes + i), vreinterpret_s32_s8(bytes), 0);
        }
      } else {
        for (int64_t i = 0; i < whole; ++i) codes[i] = 0;
      }
      for (int64_t i = whole; i < channels; ++i) {
        const float code = code_of(values[i], grid, top);
        codes[i] = range.finite ? static_cast<int8_t>(code - inside) : 0;
        sum += codes[i];
      }
      for (int64_t i = channels; i < width; ++i) codes[i] = 0;
      out.step[place] = range.finite ? grid.step : NAN;
      out.rest[place] = range.finite ? inside - grid.zero : 0.0f;
      out.shift[place] = -128 * sum;
    }
    quantize_outliers(row + normal, g, out, token);
  }
}

}  // namespace bitwright
