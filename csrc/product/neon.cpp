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

// A nibble holds two codes, so a table of sixteen bytes says the level of either: one table for the lower code, one for
// the upper.
struct Tables {
  int8x16_t lower, upper;

  explicit Tables(const uint8_t* levels) {  // of one slot
    const uint8_t low[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8_t high[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t four = vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(levels)));
    const int8x16_t table = vreinterpretq_s8_u8(veorq_u8(four, vdupq_n_u8(128)));
    lower = vqtbl1q_s8(table, vld1q_u8(low));
    upper = vqtbl1q_s8(table, vld1q_u8(high));
  }
};

struct Weights {
  int8x16_t w[4];  // channels 0-15, 16-31, 32-47, 48-63 of one slot

  Weights(uint8x16_t codes, const Tables& t) {
    const uint8x16_t low = vandq_u8(codes, vdupq_n_u8(15)), high = vshrq_n_u8(codes, 4);
    w[0] = vqtbl1q_s8(t.lower, low);
    w[1] = vqtbl1q_s8(t.upper, low);
    w[2] = vqtbl1q_s8(t.lower, high);
    w[3] = vqtbl1q_s8(t.upper, high);
  }
};

// Where a group has the codes of row 4 * r + i, from channel 64 * line on.
inline const uint8_t* codes_of(const uint8_t* group, int64_t lines, int64_t r, int64_t i, int64_t line) {
  return group + TileLayout::kCodes + ((r / 4 * 4 + i) * lines + line) * 64 + r % 4 * 16;
}

inline int8x16_t signed_bytes(const uint8_t* p) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128)));
}

inline float32x4_t halves(const uint8_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

inline float32x4_t add_group(float32x4_t f, int32x4_t sum, const uint8_t* group, const Geometry& g, int64_t r,
                             int64_t index, float step, float rest) {
  const float32x4_t factor = vmulq_f32(halves(group + TileLayout::kScales + r * 8), vdupq_n_f32(step));
  f = vfmaq_f32(f, vcvtq_f32_s32(sum), factor);
  if (rest != 0.0f) {
    int32_t levels[4];
    for (int64_t i = 0; i < 4; ++i) levels[i] = level_sum(group, g, r * 4 + i, index);
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
  const int64_t width = g.width(), lines = width / kStep;
  float32x4_t f[kQuarters];
  for (int64_t r = 0; r < kQuarters; ++r) f[r] = vdupq_n_f32(0.0f);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    const int8_t* x = a.codes + index * width;
    for (int64_t r = 0; r < kQuarters; ++r) {
      int32x4_t sums[4];
      for (int64_t i = 0; i < 4; ++i) {
        const Tables tables(levels_of(group, r * 4 + i));
        int32x4_t sum = vdupq_n_s32(0), more = sum;
        for (int64_t line = 0; line < lines; ++line) {
          const Weights weights(vld1q_u8(codes_of(group, lines, r, i, line)), tables);
          const int8_t* v = x + line * kStep;
          sum = vdotq_s32(sum, weights.w[0], vld1q_s8(v));
          more = vdotq_s32(more, weights.w[1], vld1q_s8(v + 16));
          sum = vdotq_s32(sum, weights.w[2], vld1q_s8(v + 32));
          more = vdotq_s32(more, weights.w[3], vld1q_s8(v + 48));
        }
        sums[i] = vaddq_s32(sum, more);
      }
      const int32x4_t sum = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
      f[r] = add_group(f[r], sum, group, g, r, index, a.step[index], a.rest[index]);
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

// A group of 32 rows as bytes [channels / 4][32][4]: what one broadcast of four channels multiplies.
void decode_group(const uint8_t* group, const Geometry& g, uint8_t* out) {
  const int64_t lines = g.width() / kStep;
  for (int64_t r = 0; r < kQuarters; ++r) {
    for (int64_t i = 0; i < 4; ++i) {
      const Tables tables(levels_of(group, r * 4 + i));
      for (int64_t line = 0; line < lines; ++line) {
        const Weights weights(vld1q_u8(codes_of(group, lines, r, i, line)), tables);
        for (int64_t part = 0; part < 4; ++part) {
          const int32x4_t quads = vreinterpretq_s32_s8(weights.w[part]);
          int32_t* to = reinterpret_cast<int32_t*>(out + (line * 16 + part * 4) * 128) + r * 4 + i;
          vst1q_lane_s32(to, quads, 0);
          vst1q_lane_s32(to + 32, quads, 1);
          vst1q_lane_s32(to + 64, quads, 2);
          vst1q_lane_s32(to + 96, quads, 3);
        }
      }
    }
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
    decode_group(group, g, scratch);
    const int64_t at = index * a.tokens + first;
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t step = 0; step < width; step += 16) {
        multiply_block(scratch + step * 32 + half * 64, a.codes + at * width + step, width, tokens, sums + half * 16,
                       step == 0);
      }
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t r = 0; r < kQuarters; ++r) {
        const int64_t place = token * kTileRows + r * 4;
        vst1q_f32(f + place, add_group(vld1q_f32(f + place), vld1q_s32(sums + place), group, g, r, index,
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
