// The product with NEON and its dot-product instructions: one table lookup turns sixteen codes into levels, one sdot
// multiplies them; smlal where inputs have more than four bits. Weights are signed here (128 is taken off levels and off
// codes of a whole byte), so that sums over levels need no `shift`.
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

constexpr int64_t kQuarters = kTileRows / 4;  // a vector holds four rows of four channels

inline int8x16_t broadcast(const int8_t* p) {
  return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(p)));
}

inline int8x16_t signed_bytes(uint8x16_t v) { return vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128))); }

// What one group's codes of a slot stand for.
template <typename Form>
struct Tables {
  explicit Tables(const uint8_t*) {}
};

// Two bits: a nibble holds two codes, so a table of sixteen bytes says the level of either: one table for the lower code,
// one for the upper.
template <>
struct Tables<Pairs> {
  int8x16_t lower, upper;

  explicit Tables(const uint8_t* levels) {
    const uint8_t low[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8_t high[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t four = vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(levels)));
    lower = vqtbl1q_s8(signed_bytes(four), vld1q_u8(low));
    upper = vqtbl1q_s8(signed_bytes(four), vld1q_u8(high));
  }
};

template <>
struct Tables<Form<4, true>> {
  int8x16_t sixteen;

  explicit Tables(const uint8_t* levels) : sixteen(signed_bytes(vld1q_u8(levels))) {}
};

template <typename Form>
struct Weights {
  int8x16_t w[4];  // channels 0-15, 16-31, 32-47, 48-63 of one slot

  Weights(const uint8_t* codes, const Tables<Form>& t) {
    if constexpr (Form::kBits == 8) {
      for (int i = 0; i < 4; ++i) w[i] = signed_bytes(vld1q_u8(codes + i * 64));
    } else {
      for (int i = 0; i < Form::kLines; ++i) {
        const uint8x16_t line = vld1q_u8(codes + i * 64);
        const uint8x16_t low = vandq_u8(line, vdupq_n_u8(15)), high = vshrq_n_u8(line, 4);
        if constexpr (Form::kBits == 2) {
          w[0] = vqtbl1q_s8(t.lower, low);
          w[1] = vqtbl1q_s8(t.upper, low);
          w[2] = vqtbl1q_s8(t.lower, high);
          w[3] = vqtbl1q_s8(t.upper, high);
        } else if constexpr (Form::kTable) {
          w[i * 2] = vqtbl1q_s8(t.sixteen, low);
          w[i * 2 + 1] = vqtbl1q_s8(t.sixteen, high);
        } else {
          w[i * 2] = vreinterpretq_s8_u8(low);
          w[i * 2 + 1] = vreinterpretq_s8_u8(high);
        }
      }
    }
  }
};

// Where a group has the codes of row 4 * r + i, from channel 64 * step on.
template <typename Form>
inline const uint8_t* codes_of(const uint8_t* group, int64_t steps, int64_t r, int64_t i, int64_t step) {
  return group + Form::kCodes + ((r / 4 * 4 + i) * steps + step) * Form::kLines * 64 + r % 4 * 16;
}

// Inputs of up to four bits.
struct Bytes {
  using Code = int8_t;
  static constexpr int64_t kHalf = 64;  // bytes from sixteen decoded rows to the next

  static const Code* codes(const Activations& a) { return a.codes; }

  // 64 channels of one slot; two chains of sums hide the latency of the multiply.
  static void channels(const int8x16_t* w, const Code* v, int32x4_t& even, int32x4_t& odd) {
    even = vdotq_s32(even, w[0], vld1q_s8(v));
    odd = vdotq_s32(odd, w[1], vld1q_s8(v + 16));
    even = vdotq_s32(even, w[2], vld1q_s8(v + 32));
    odd = vdotq_s32(odd, w[3], vld1q_s8(v + 48));
  }

  // Sixteen channels of a row into the cache: bytes [channels / 4][32][4].
  static void put(uint8_t* out, int64_t row, int8x16_t w) {
    const int32x4_t quads = vreinterpretq_s32_s8(w);
    int32_t* to = reinterpret_cast<int32_t*>(out) + row;
    vst1q_lane_s32(to, quads, 0);
    vst1q_lane_s32(to + 32, quads, 1);
    vst1q_lane_s32(to + 64, quads, 2);
    vst1q_lane_s32(to + 96, quads, 3);
  }

  // Sixteen rows times sixteen channels of decoded weights.
  struct Block {
    int8x16_t weights[4][4];

    explicit Block(const uint8_t* w) {
      for (int part = 0; part < 4; ++part) {
        for (int r = 0; r < 4; ++r) weights[part][r] = vreinterpretq_s8_u8(vld1q_u8(w + part * 128 + r * 16));
      }
    }

    void multiply(const Code* x, int32x4_t sum[4]) const {
      for (int part = 0; part < 4; ++part) {
        const int8x16_t value = broadcast(x + part * 4);
        for (int r = 0; r < 4; ++r) sum[r] = vdotq_s32(sum[r], weights[part][r], value);
      }
    }
  };
};

// Inputs of up to eight bits, -255..255.
struct Words {
  using Code = int16_t;
  static constexpr int64_t kHalf = 32;

  static const Code* codes(const Activations& a) { return a.words; }

  static void channels(const int8x16_t* w, const Code* v, int32x4_t& even, int32x4_t& odd) {
    for (int i = 0; i < 4; ++i, v += 16) {
      const int16x8_t low = vmovl_s8(vget_low_s8(w[i])), high = vmovl_high_s8(w[i]);
      const int16x8_t x0 = vld1q_s16(v), x1 = vld1q_s16(v + 8);
      even = vmlal_high_s16(vmlal_s16(even, vget_low_s16(low), vget_low_s16(x0)), low, x0);
      odd = vmlal_high_s16(vmlal_s16(odd, vget_low_s16(high), vget_low_s16(x1)), high, x1);
    }
  }

  // Words [channels][32].
  static void put(uint8_t* out, int64_t row, int8x16_t w) {
    int8_t bytes[16];
    vst1q_s8(bytes, w);
    int16_t* to = reinterpret_cast<int16_t*>(out) + row;
    for (int channel = 0; channel < 16; ++channel) to[channel * kTileRows] = bytes[channel];
  }

  // Sixteen rows times eight channels.
  struct Block {
    int16x8_t weights[8][2];

    explicit Block(const uint8_t* w) {
      for (int channel = 0; channel < 8; ++channel) {
        const int16_t* rows = reinterpret_cast<const int16_t*>(w) + channel * kTileRows;
        weights[channel][0] = vld1q_s16(rows);
        weights[channel][1] = vld1q_s16(rows + 8);
      }
    }

    void multiply(const Code* x, int32x4_t sum[4]) const {
      for (int channel = 0; channel < 8; ++channel) {
        for (int r = 0; r < 2; ++r) {
          const int16x8_t w = weights[channel][r];
          sum[r * 2] = vmlal_n_s16(sum[r * 2], vget_low_s16(w), x[channel]);
          sum[r * 2 + 1] = vmlal_high_n_s16(sum[r * 2 + 1], w, x[channel]);
        }
      }
    }
  };
};

inline float32x4_t halves(const uint8_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

template <typename Form>
inline float32x4_t add_group(float32x4_t f, int32x4_t sum, const uint8_t* group, const Geometry& g, int64_t r,
                             int64_t index, const Activations& a, int64_t at) {
  const float rest = a.rest[at];
  const float32x4_t factor = vmulq_f32(halves(group + Form::kScales + r * 8), vdupq_n_f32(a.step[at]));
  if constexpr (!Form::kTable) {  // codes stand for code - zero
    const uint8_t* zeros = group + Form::kLevels + r * 4;
    for (int i = 0; i < 4; ++i) sum[i] += (zeros[i] - (Form::kBits == 8 ? 128 : 0)) * (a.shift[at] / 128);
  }
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
      sum = vdotq_s32(sum, signed_bytes(vld1q_u8(tile + layout.outliers_at + channel * 32 + r * 16)), broadcast(codes + channel));
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

template <typename Form, typename Input>
void one_token(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
               const float* bias, float* y, int64_t rows) {
  const int64_t width = g.width(), steps = width / kStep;
  float32x4_t f[kQuarters];
  for (int64_t r = 0; r < kQuarters; ++r) f[r] = vdupq_n_f32(0.0f);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    const typename Input::Code* x = Input::codes(a) + index * width;
    for (int64_t r = 0; r < kQuarters; ++r) {
      int32x4_t sums[4];
      for (int64_t i = 0; i < 4; ++i) {
        const Tables<Form> tables(levels_of(group, g, r * 4 + i));
        int32x4_t even = vdupq_n_s32(0), odd = even;
        for (int64_t step = 0; step < steps; ++step) {
          const Weights<Form> weights(codes_of<Form>(group, steps, r, i, step), tables);
          Input::channels(weights.w, x + step * kStep, even, odd);
        }
        sums[i] = vaddq_s32(even, odd);
      }
      const int32x4_t sum = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
      f[r] = add_group<Form>(f[r], sum, group, g, r, index, a, index);
    }
  }
  for (int64_t r = 0; r < kQuarters && r * 4 < rows; ++r) {
    finish(f[r], tile, layout, g, a, 0, r, bias ? bias + r * 4 : nullptr, y + r * 4, rows - r * 4);
  }
}

// A block of weights in sixteen registers, multiplied with every token; sums [token][32] in memory.
template <typename Input>
inline void multiply_block(const uint8_t* w, const typename Input::Code* x, int64_t width, int64_t tokens,
                           int32_t* sums, bool fresh) {
  const typename Input::Block block(w);
  for (int64_t token = 0; token < tokens; ++token, x += width, sums += kTileRows) {
    int32x4_t sum[4];
    for (int r = 0; r < 4; ++r) sum[r] = fresh ? vdupq_n_s32(0) : vld1q_s32(sums + r * 4);
    block.multiply(x, sum);
    for (int r = 0; r < 4; ++r) vst1q_s32(sums + r * 4, sum[r]);
  }
}

// A group of 32 rows as a block wants it.
template <typename Form, typename Input>
void decode_group(const uint8_t* group, const Geometry& g, uint8_t* out) {
  const int64_t steps = g.width() / kStep, unit = sizeof(typename Input::Code);
  for (int64_t r = 0; r < kQuarters; ++r) {
    for (int64_t i = 0; i < 4; ++i) {
      const Tables<Form> tables(levels_of(group, g, r * 4 + i));
      for (int64_t step = 0; step < steps; ++step) {
        const Weights<Form> weights(codes_of<Form>(group, steps, r, i, step), tables);
        for (int64_t part = 0; part < 4; ++part) {
          Input::put(out + (step * 4 + part) * 16 * kTileRows * unit, r * 4 + i, weights.w[part]);
        }
      }
    }
  }
}

template <typename Form, typename Input>
void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const int64_t width = g.width(), unit = sizeof(typename Input::Code), channels = 16 / unit;
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + kTileRows * width * unit);
  float* f = reinterpret_cast<float*>(sums + kTokenBlock * kTileRows);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    decode_group<Form, Input>(group, g, scratch);
    const int64_t at = index * a.tokens + first;
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t channel = 0; channel < width; channel += channels) {
        multiply_block<Input>(scratch + channel * kTileRows * unit + half * Input::kHalf,
                              Input::codes(a) + at * width + channel, width, tokens, sums + half * 16, channel == 0);
      }
    }
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t r = 0; r < kQuarters; ++r) {
        const int64_t place = token * kTileRows + r * 4;
        vst1q_f32(f + place, add_group<Form>(vld1q_f32(f + place), vld1q_s32(sums + place), group, g, r, index, a,
                                             at + token));
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

template <typename Form, typename Input>
void product(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
             uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* tile = weights + t * layout.bytes;
    const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
    const float* part = bias ? bias + row : nullptr;
    if (a.tokens == 1) {
      one_token<Form, Input>(tile, layout, g, a, part, y + row, rows);
      continue;
    }
    for (int64_t token = 0; token < a.tokens; token += kTokenBlock) {
      const int64_t block = smaller(kTokenBlock, a.tokens - token);
      many_tokens<Form, Input>(tile, layout, g, a, part, y + row, scratch, token, block, rows);
    }
  }
}

}  // namespace

void product_neon(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                  uint8_t* scratch, int64_t first, int64_t last) {
  with_form<Bytes, Words>(g, a, [&](auto form, auto inputs) {
    product<decltype(form), decltype(inputs)>(weights, g, a, bias, y, scratch, first, last);
  });
}

}  // namespace bitwright
