// The product with NEON and its dot-product instructions: one table lookup turns sixteen codes into levels, one sdot
// multiplies them. Levels are signed here (the stored 128 is taken off the table), so sums need no `shift`.
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

constexpr int64_t kQuarters = kTileRows / 4;  // a vector holds four rows of four channels

inline int8x16_t broadcast(const int8_t* p) {
  return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(p)));
}

inline uint8x16_t per_row(uint8_t a, uint8_t b, uint8_t c, uint8_t d) {
  const uint8_t bytes[16] = {a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d};
  return vld1q_u8(bytes);
}

struct Decoded {
  int8x16_t w[4];  // channels 0-3, 4-7, 8-11, 12-15 of four rows
};

inline Decoded decode(uint8x16_t codes, int8x16_t table) {
  const uint8x16_t mask = vdupq_n_u8(3), rows = per_row(0, 4, 8, 12);
  Decoded d;
  d.w[0] = vqtbl1q_s8(table, vorrq_u8(vandq_u8(codes, mask), rows));
  d.w[1] = vqtbl1q_s8(table, vorrq_u8(vandq_u8(vshrq_n_u8(codes, 2), mask), rows));
  d.w[2] = vqtbl1q_s8(table, vorrq_u8(vandq_u8(vshrq_n_u8(codes, 4), mask), rows));
  d.w[3] = vqtbl1q_s8(table, vorrq_u8(vshrq_n_u8(codes, 6), rows));
  return d;
}

inline int8x16_t signed_bytes(const uint8_t* p) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128)));
}

inline float32x4_t halves(const uint8_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

inline float32x4_t add_group(float32x4_t f, int32x4_t sum, const uint8_t* group, int64_t r, int64_t channels,
                             float step, float rest) {
  const float32x4_t factor = vmulq_f32(halves(group + TileLayout::kScales + r * 8), vdupq_n_f32(step));
  f = vfmaq_f32(f, vcvtq_f32_s32(sum), factor);
  if (rest != 0.0f) {
    int32_t levels[4];
    for (int64_t i = 0; i < 4; ++i) levels[i] = level_sum(group, r * 4 + i, channels);
    f = vfmaq_f32(f, vcvtq_f32_s32(vld1q_s32(levels)), vmulq_f32(factor, vdupq_n_f32(rest)));
  }
  return f;
}

inline void finish(float32x4_t f, const uint8_t* tile, const TileLayout& layout, const Geometry& g,
                   const Activations& a, int64_t token, int64_t r, const float* bias, float* y, int64_t rows) {
  if (g.outliers) {
    const int8_t* codes = a.outliers + token * g.outlier_width();
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t channel = 0; channel < g.outlier_width(); channel += 4) {
      sum = vdotq_s32(sum, signed_bytes(tile + layout.outliers_at + channel * 32 + r * 16), broadcast(codes + channel));
    }
    const float32x4_t scale = vld1q_f32(reinterpret_cast<const float*>(tile + layout.outlier_scales_at) + r * 4);
    f = vfmaq_f32(f, vcvtq_f32_s32(sum), vmulq_f32(scale, vdupq_n_f32(a.outlier_step[token])));
  }
  if (rows >= 4) {
    if (bias) f = vaddq_f32(f, vld1q_f32(bias));
    vst1q_f32(y, f);
    return;
  }
  float values[4];
  vst1q_f32(values, f);
  for (int64_t i = 0; i < rows; ++i) y[i] = bias ? values[i] + bias[i] : values[i];
}

void one_token(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
               const float* bias, float* y, int64_t rows) {
  const int64_t width = g.width();
  float32x4_t f[kQuarters];
  for (int64_t r = 0; r < kQuarters; ++r) f[r] = vdupq_n_f32(0.0f);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    const int8_t* x = a.codes + index * width;
    for (int64_t r = 0; r < kQuarters; ++r) {
      const int8x16_t table = signed_bytes(group + r * 16);
      const uint8_t* codes = group + TileLayout::kCodes + r * 16;
      int32x4_t sum = vdupq_n_s32(0), more = sum;
      for (int64_t step = 0; step < width; step += kStep) {
        const Decoded d = decode(vld1q_u8(codes + step * 8), table);
        sum = vdotq_s32(sum, d.w[0], broadcast(x + step));
        more = vdotq_s32(more, d.w[1], broadcast(x + step + 4));
        sum = vdotq_s32(sum, d.w[2], broadcast(x + step + 8));
        more = vdotq_s32(more, d.w[3], broadcast(x + step + 12));
      }
      f[r] = add_group(f[r], vaddq_s32(sum, more), group, r, g.channels(index), a.step[index], a.rest[index]);
    }
  }
  for (int64_t r = 0; r < kQuarters && r * 4 < rows; ++r) {
    finish(f[r], tile, layout, g, a, 0, r, bias ? bias + r * 4 : nullptr, y + r * 4, rows - r * 4);
  }
}

// Sixteen rows and sixteen channels in sixteen registers, multiplied with every token; sums [token][32] in memory.
inline void multiply_block(const uint8_t* w, const int8_t* x, int64_t width, int64_t tokens, int32_t* sums,
                           bool fresh) {
  int8x16_t weights[4][4];
  for (int part = 0; part < 4; ++part) {
    for (int r = 0; r < 4; ++r) weights[part][r] = vreinterpretq_s8_u8(vld1q_u8(w + part * 128 + r * 16));
  }
  for (int64_t token = 0; token < tokens; ++token, x += width, sums += kTileRows) {
    int32x4_t sum[4];
    for (int r = 0; r < 4; ++r) sum[r] = fresh ? vdupq_n_s32(0) : vld1q_s32(sums + r * 4);
    for (int part = 0; part < 4; ++part) {
      const int8x16_t value = broadcast(x + part * 4);
      for (int r = 0; r < 4; ++r) sum[r] = vdotq_s32(sum[r], weights[part][r], value);
    }
    for (int r = 0; r < 4; ++r) vst1q_s32(sums + r * 4, sum[r]);
  }
}

void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const int64_t width = g.width();
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + kTileRows * width);
  float* f = reinterpret_cast<float*>(sums + kTokenBlock * kTileRows);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    for (int64_t r = 0; r < kQuarters; ++r) {
      const int8x16_t table = signed_bytes(group + r * 16);
      for (int64_t step = 0; step < width; step += kStep) {
        const Decoded d = decode(vld1q_u8(group + TileLayout::kCodes + step * 8 + r * 16), table);
        uint8_t* out = scratch + step * 32 + r * 16;
        for (int i = 0; i < 4; ++i) vst1q_u8(out + i * 128, vreinterpretq_u8_s8(d.w[i]));
      }
    }
    const int64_t at = index * a.tokens + first;
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t step = 0; step < width; step += kStep) {
        multiply_block(scratch + step * 32 + half * 64, a.codes + at * width + step, width, tokens, sums + half * 16,
                       step == 0);
      }
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t r = 0; r < kQuarters; ++r) {
        const int64_t place = token * kTileRows + r * 4;
        vst1q_f32(f + place, add_group(vld1q_f32(f + place), vld1q_s32(sums + place), group, r, g.channels(index),
                                       a.step[at + token], a.rest[at + token]));
      }
    }
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t r = 0; r < kQuarters && r * 4 < rows; ++r) {
      finish(vld1q_f32(f + token * kTileRows + r * 4), tile, layout, g, a, first + token, r,
             bias ? bias + r * 4 : nullptr, y + (first + token) * g.rows + r * 4, rows - r * 4);
    }
  }
}

}  // namespace

void product_neon(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                  uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* tile = weights + t * layout.bytes;
    const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
    const float* part = bias ? bias + row : nullptr;
    if (a.tokens == 1) {
      one_token(tile, layout, g, a, part, y + row, rows);
      continue;
    }
    for (int64_t token = 0; token < a.tokens; token += kTokenBlock) {
      many_tokens(tile, layout, g, a, part, y + row, scratch, token, smaller(kTokenBlock, a.tokens - token), rows);
    }
  }
}

}  // namespace bitwright
