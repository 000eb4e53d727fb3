// The product with AVX2 and FMA: codes become unsigned bytes (decode256.h), which vpmaddubsw multiplies with signed ones,
// or vpmaddwd, widened, where inputs have more than four bits.
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "decode256.h"

namespace bitwright {

namespace {

constexpr int64_t kGroupsAhead = 4;  // that few_tokens asks memory for: 5 KB with groups of 128

ALWAYS __m256i broadcast(const int8_t* p) {
  int four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

ALWAYS __m256 halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Inputs of up to four bits. Two products of bytes stay below 2 * 255 * 15 = 7,650, so four pairs fit 16 bits.
struct Bytes {
  static constexpr int64_t kUnit = 1;  // bytes of an input

  static ALWAYS const void* codes(const Activations& a) { return a.codes; }

  // Of 4 x 32 weights and inputs.
  static ALWAYS __m256i four(const __m256i* w, __m256i x0, __m256i x1, __m256i x2, __m256i x3) {
    const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], x0), _mm256_maddubs_epi16(w[1], x1));
    const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], x2), _mm256_maddubs_epi16(w[3], x3));
    return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
  }

  // Decoded weights of two slots, inputs with every 16 bytes twice: 64 channels.
  static ALWAYS __m256i channels(const __m256i* w, const int8_t* v) {
    return four(w, load(v), load(v + 32), load(v + 64), load(v + 96));
  }

  // Four channels of eight rows into the cache.
  static ALWAYS void put(uint8_t* quads, int64_t quad, __m256i v) { store(quads + quad * 128, v); }
};

// Inputs of up to eight bits, -255..255: products of bytes would overflow 16 bits, so weights are widened to 16 and
// vpmaddwd adds two products into 32.
struct Words {
  static constexpr int64_t kUnit = 2;

  static ALWAYS const void* codes(const Activations& a) { return a.words; }

  static ALWAYS __m256i four(const __m256i* w, __m256i x0, __m256i x1, __m256i x2, __m256i x3) {
    const __m256i a = _mm256_add_epi32(_mm256_madd_epi16(w[0], x0), _mm256_madd_epi16(w[1], x1));
    const __m256i b = _mm256_add_epi32(_mm256_madd_epi16(w[2], x2), _mm256_madd_epi16(w[3], x3));
    return _mm256_add_epi32(a, b);
  }

  static ALWAYS __m256i channels(const __m256i* w, const int8_t* v) {
    const __m256i none = _mm256_setzero_si256();
    __m256i wide[8];
    UNROLL for (int i = 0; i < 4; ++i) {
      wide[i * 2] = _mm256_unpacklo_epi8(w[i], none);
      wide[i * 2 + 1] = _mm256_unpackhi_epi8(w[i], none);
    }
    return _mm256_add_epi32(four(wide, load(v), load(v + 32), load(v + 64), load(v + 96)),
                            four(wide + 4, load(v + 128), load(v + 160), load(v + 192), load(v + 224)));
  }

  static ALWAYS void put(uint8_t* quads, int64_t quad, __m256i v) {
    const char no = static_cast<char>(0x80);  // a zero
    const __m256i first = _mm256_setr_epi8(0, no, 1, no, 4, no, 5, no, 8, no, 9, no, 12, no, 13, no,  //
                                           0, no, 1, no, 4, no, 5, no, 8, no, 9, no, 12, no, 13, no);
    const __m256i last = _mm256_setr_epi8(2, no, 3, no, 6, no, 7, no, 10, no, 11, no, 14, no, 15, no,  //
                                          2, no, 3, no, 6, no, 7, no, 10, no, 11, no, 14, no, 15, no);
    store(quads + quad * 256, _mm256_shuffle_epi8(v, first));
    store(quads + quad * 256 + 128, _mm256_shuffle_epi8(v, last));
  }
};

// What the offset of stored weights adds to the sums of eight rows, taken off: 128 a channel, or the row's zero point.
template <typename Form>
ALWAYS __m256i without_offset(__m256i sum, const uint8_t* group, int64_t r, int32_t shift) {
  if constexpr (Form::kTable) {
    return _mm256_add_epi32(sum, _mm256_set1_epi32(shift));
  } else {
    const void* zeros = group + Form::kLevels + r * 8;
    const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(zeros)));
    return _mm256_add_epi32(sum, _mm256_mullo_epi32(zero, _mm256_set1_epi32(shift / 128)));  // exact: a multiple of 128
  }
}

// What is done once a group: f = fma(D, scale * step, f), and the part of inputs outside 0..15 where there is one.
template <typename Form>
ALWAYS __m256 add_group(__m256 f, __m256i sum, __m256 scale, const uint8_t* group, int64_t r, const Activations& a,
                        int64_t at) {
  const __m256i all = without_offset<Form>(sum, group, r, a.shift[at]);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), _mm256_mul_ps(scale, _mm256_set1_ps(a.step[at])), f);
}

__attribute__((noinline)) __m256 add_rest(__m256 f, __m256 scale, const uint8_t* group, const Geometry& g, int64_t r,
                                          int64_t index, const Activations& a, int64_t at) {
  alignas(32) int32_t levels[8];
  for (int64_t i = 0; i < 8; ++i) levels[i] = level_sum(group, g, r * 8 + i, index);
  const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(a.step[at]));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(load(levels)), _mm256_mul_ps(factor, _mm256_set1_ps(a.rest[at])), f);
}

// Adds the outliers' part to 32 rows, from their weights and one token's inputs in 16 bits. `wide` says where the
// weights of four channels and eight rows are found: rows 0-3 and rows 4-7.
template <typename Wide>
ALWAYS void add_outliers(__m256* f, const uint8_t* tile, const TileLayout& layout, const Geometry& g,
                         const Activations& a, int64_t token, Wide wide) {
  __m256i low[4], high[4];
  UNROLL for (int r = 0; r < 4; ++r) low[r] = high[r] = _mm256_setzero_si256();
  const int8_t* codes = a.outliers + token * g.outlier_width();
  for (int64_t channel = 0; channel < g.outlier_width(); channel += 4) {
    int four;
    std::memcpy(&four, codes + channel, 4);
    const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
    UNROLL for (int r = 0; r < 4; ++r) {
      low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(wide(channel, r, 0), x));
      high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(wide(channel, r, 1), x));
    }
  }
  const float* scales = reinterpret_cast<const float*>(tile + layout.outlier_scales_at);
  UNROLL for (int r = 0; r < 4; ++r) {
    // hadd works inside lanes: put the quarters back in order.
    const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[r], high[r]), 0xd8);
    const __m256i total = _mm256_add_epi32(sum, _mm256_set1_epi32(a.outlier_shift[token]));
    const __m256 factor = _mm256_mul_ps(_mm256_load_ps(scales + r * 8), _mm256_set1_ps(a.outlier_step[token]));
    f[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), factor, f[r]);
  }
}

// Bias and the store of 32 rows; only `rows` of them exist.
ALWAYS void finish(const __m256* f, const float* bias, float* y, int64_t rows) {
  if (rows == kTileRows) {
    UNROLL for (int r = 0; r < 4; ++r) {
      _mm256_storeu_ps(y + r * 8, bias ? _mm256_add_ps(f[r], _mm256_loadu_ps(bias + r * 8)) : f[r]);
    }
    return;
  }
  alignas(32) float values[kTileRows];
  UNROLL for (int r = 0; r < 4; ++r) _mm256_store_ps(values + r * 8, f[r]);
  for (int64_t i = 0; i < rows; ++i) y[i] = bias ? values[i] + bias[i] : values[i];
}

// The hardware's prefetcher stops at every page, and decoding leaves it little time: ask for what comes next in memory.
ALWAYS void prefetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// Decode of up to four tokens: weights go from memory through registers once and meet every token there. `x` holds the
// inputs with every 16 bytes twice, [token][group][bytes * 2]; kSteps: times 64 channels in a group, 0: any number.
template <typename Form, typename Input, int kTokens, int kSteps>
void few_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                const int8_t* x, const float* bias, float* y, int64_t first, int64_t rows) {
  const Decoder d;
  const int64_t steps = kSteps ? kSteps : g.width() / kStep, line = Form::kLines * 64;
  const int64_t inputs_bytes = steps * kStep * Input::kUnit * 2, stride = g.groups() * inputs_bytes;
  __m256 f[kTokens][4];
  UNROLL for (int t = 0; t < kTokens; ++t) UNROLL for (int r = 0; r < 4; ++r) f[t][r] = _mm256_setzero_ps();
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    const int8_t* inputs = x + index * inputs_bytes;
    const int64_t at = index * a.tokens + first;
    const uint8_t* ahead = group + kGroupsAhead * layout.group_bytes;
    prefetch(ahead, Form::kCodes);
    for (int64_t sixteen = 0; sixteen < 2; ++sixteen) {
      __m256i sums[2][kTokens][4];
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t slot = sixteen * 16 + i * 4 + half * 2;
        const Tables<Form> tables(group + Form::kLevels + slot * Form::kLevelBytes, d);
        const int64_t place = Form::kCodes + (sixteen * 4 + i) * steps * line;
        const uint8_t* codes = group + place + half * 32;
        if (half == 0) prefetch(ahead + place, steps * line);
        __m256i sum[kTokens];
        UNROLL for (int t = 0; t < kTokens; ++t) sum[t] = _mm256_setzero_si256();
        UNROLL_TWO for (int64_t step = 0; step < steps; ++step) {
          const Weights<Form> weights(codes + step * line, tables, d);
          UNROLL for (int t = 0; t < kTokens; ++t) {
            const int8_t* v = inputs + t * stride + step * kStep * Input::kUnit * 2;
            sum[t] = _mm256_add_epi32(sum[t], Input::channels(weights.w, v));
          }
        }
        UNROLL for (int t = 0; t < kTokens; ++t) sums[half][t][i] = sum[t];
      }
      UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t r = sixteen * 2 + half;
        const __m256 scale = halves(group + Form::kScales + r * 16);
        UNROLL for (int t = 0; t < kTokens; ++t) {
          const __m256i* v = sums[half][t];
          const __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
          f[t][r] = add_group<Form>(f[t][r], sum, scale, group, r, a, at + t);
          if (__builtin_expect(a.rest[at + t] != 0.0f, 0)) {
            f[t][r] = add_rest(f[t][r], scale, group, g, r, index, a, at + t);
          }
        }
      }
    }
  }
  const uint8_t* outliers = tile + layout.outliers_at;
  for (int t = 0; t < kTokens; ++t) {
    if (g.outliers) {
      add_outliers(f[t], tile, layout, g, a, first + t, [&](int64_t channel, int r, int half) {
        const void* w = outliers + channel * 32 + r * 32 + half * 16;
        return _mm256_cvtepu8_epi16(_mm_load_si128(static_cast<const __m128i*>(w)));
      });
    }
    finish(f[t], bias, y + (first + t) * g.rows, rows);
  }
}

// The inputs of few tokens as few_tokens wants them.
template <typename Input>
void double_inputs(const Geometry& g, const Activations& a, int64_t first, int64_t tokens, int8_t* x) {
  const int64_t bytes = g.width() * Input::kUnit;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t index = 0; index < g.groups(); ++index) {
      const int8_t* codes = static_cast<const int8_t*>(Input::codes(a)) + (index * a.tokens + first + t) * bytes;
      for (int64_t i = 0; i < bytes; i += 16, x += 32) {
        store(x, _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
      }
    }
  }
}

// A group of 32 rows as bytes [channels / 4][32][4]: what one broadcast of four channels multiplies. Where inputs are
// words, as words [channels / 2][32][2].
template <typename Form, typename Input>
void decode_group(const uint8_t* group, const Geometry& g, uint8_t* out) {
  const Decoder d;
  const int64_t steps = g.width() / kStep, line = Form::kLines * 64;
  for (int64_t r = 0; r < 4; ++r) {
    const int64_t slot = r / 2 * 16 + r % 2 * 2;
    for (int64_t step = 0; step < steps; ++step) {
      __m256i w[4][4];  // [i][part]: slots side by side are rows r * 8 + i and r * 8 + 4 + i
      UNROLL for (int i = 0; i < 4; ++i) {
        const Tables<Form> tables(group + Form::kLevels + (slot + i * 4) * Form::kLevelBytes, d);
        const int64_t at = (r / 2 * 4 + i) * steps + step;
        const Weights<Form> weights(group + Form::kCodes + at * line + r % 2 * 32, tables, d);
        UNROLL for (int part = 0; part < 4; ++part) w[i][part] = weights.w[part];
      }
      UNROLL for (int part = 0; part < 4; ++part) {
        const __m256i a = _mm256_unpacklo_epi32(w[0][part], w[1][part]), b = _mm256_unpacklo_epi32(w[2][part], w[3][part]);
        const __m256i c = _mm256_unpackhi_epi32(w[0][part], w[1][part]), e = _mm256_unpackhi_epi32(w[2][part], w[3][part]);
        uint8_t* quads = out + (step * 16 + part * 4) * 128 * Input::kUnit + r * 32;
        Input::put(quads, 0, _mm256_unpacklo_epi64(a, b));
        Input::put(quads, 1, _mm256_unpackhi_epi64(a, b));
        Input::put(quads, 2, _mm256_unpacklo_epi64(c, e));
        Input::put(quads, 3, _mm256_unpackhi_epi64(c, e));
      }
    }
  }
}

// Sixteen rows and 16 bytes of inputs' channels in eight registers, multiplied with every token; `bytes` from one
// token's to the next one's. Sums [token][32] are in memory between the calls of a group; the last adds them to f [token][32].
template <typename Form, typename Input, bool kFirst, bool kLast>
void multiply_block(const uint8_t* w, const int8_t* x, int64_t bytes, int64_t tokens, int32_t* sums, float* f,
                    const uint8_t* group, int64_t half, const Activations& a, int64_t at) {
  const __m256i top[4] = {load(w), load(w + 128), load(w + 256), load(w + 384)};
  const __m256i bottom[4] = {load(w + 32), load(w + 160), load(w + 288), load(w + 416)};
  const uint8_t* scales = group + Form::kScales + half * 32;
  const __m256 scale0 = halves(scales), scale1 = halves(scales + 16);
  for (int64_t token = 0; token < tokens; ++token, x += bytes, sums += kTileRows, f += kTileRows) {
    const __m256i x0 = broadcast(x), x1 = broadcast(x + 4), x2 = broadcast(x + 8), x3 = broadcast(x + 12);
    __m256i sum0 = Input::four(top, x0, x1, x2, x3), sum1 = Input::four(bottom, x0, x1, x2, x3);
    if (!kFirst) {
      sum0 = _mm256_add_epi32(sum0, load(sums));
      sum1 = _mm256_add_epi32(sum1, load(sums + 8));
    }
    if (kLast) {
      _mm256_store_ps(f, add_group<Form>(_mm256_load_ps(f), sum0, scale0, group, half * 2, a, at + token));
      const __m256 below = _mm256_load_ps(f + 8);
      _mm256_store_ps(f + 8, add_group<Form>(below, sum1, scale1, group, half * 2 + 1, a, at + token));
    } else {
      store(sums, sum0);
      store(sums + 8, sum1);
    }
  }
}

// Prefill: a group of 32 rows is decoded once into the cache and multiplied with up to kTokenBlock tokens.
template <typename Form, typename Input>
void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const int64_t bytes = g.width() * Input::kUnit;
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + kTileRows * bytes);
  float* f = reinterpret_cast<float*>(sums + kTokenBlock * kTileRows);
  uint8_t* wide = reinterpret_cast<uint8_t*>(f + kTokenBlock * kTileRows);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    decode_group<Form, Input>(group, g, scratch);
    const int64_t at = index * a.tokens + first, last = round_up(g.channels(index) * Input::kUnit, 16) - 16;
    for (int64_t half = 0; half < 2; ++half) {
      const uint8_t* w = scratch + half * 64;
      const int8_t* x = static_cast<const int8_t*>(Input::codes(a)) + at * bytes;
      int32_t* sum = sums + half * 16;
      float* out = f + half * 16;
      if (last == 0) {
        multiply_block<Form, Input, true, true>(w, x, bytes, tokens, sum, out, group, half, a, at);
        continue;
      }
      multiply_block<Form, Input, true, false>(w, x, bytes, tokens, sum, out, group, half, a, at);
      for (int64_t step = 16; step < last; step += 16) {
        multiply_block<Form, Input, false, false>(w + step * 32, x + step, bytes, tokens, sum, out, group, half, a, at);
      }
      multiply_block<Form, Input, false, true>(w + last * 32, x + last, bytes, tokens, sum, out, group, half, a, at);
    }
    for (int64_t token = 0; token < tokens; ++token) {
      if (__builtin_expect(a.rest[at + token] == 0.0f, 1)) continue;
      for (int64_t r = 0; r < 4; ++r) {
        float* out = f + token * kTileRows + r * 8;
        const __m256 scale = halves(group + Form::kScales + r * 16);
        _mm256_store_ps(out, add_rest(_mm256_load_ps(out), scale, group, g, r, index, a, at + token));
      }
    }
  }
  const uint8_t* outliers = tile + layout.outliers_at;
  for (int64_t i = 0; i < g.outlier_width() * 2; ++i) {
    store(wide + i * 32, _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(outliers + i * 16))));
  }
  for (int64_t token = 0; token < tokens; ++token) {
    __m256 rows_of[4];
    UNROLL for (int r = 0; r < 4; ++r) rows_of[r] = _mm256_load_ps(f + token * kTileRows + r * 8);
    if (g.outliers) {
      add_outliers(rows_of, tile, layout, g, a, first + token, [&](int64_t channel, int r, int half) {
        return load(wide + channel * 64 + r * 64 + half * 32);
      });
    }
    finish(rows_of, bias, y + (first + token) * g.rows, rows);
  }
}

using Few = void (*)(const uint8_t*, const TileLayout&, const Geometry&, const Activations&, const int8_t*, const float*,
                     float*, int64_t, int64_t);

// By number of tokens; kSteps as in few_tokens.
template <typename Form, typename Input, int kSteps>
constexpr Few few[kFewTokens + 1] = {nullptr, few_tokens<Form, Input, 1, kSteps>, few_tokens<Form, Input, 2, kSteps>,
                                     few_tokens<Form, Input, 3, kSteps>, few_tokens<Form, Input, 4, kSteps>};
constexpr int64_t kFew = 12;  // tokens from which on decoding into the cache is faster

template <typename Form, typename Input>
void product(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
             uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  const bool many = a.tokens > kFew;
  const Few* run = few<Form, Input, 0>;
  // Groups of 128 have a copy of their own for the codes and inputs that there are most of.
  if constexpr (std::is_same_v<Form, Pairs> && std::is_same_v<Input, Bytes>) {
    if (g.width() == 2 * kStep) run = few<Form, Input, 2>;
  }
  for (int64_t token = 0, block; token < a.tokens; token += block) {
    block = smaller(many ? kTokenBlock : kFewTokens, a.tokens - token);
    int8_t* doubled = reinterpret_cast<int8_t*>(scratch);
    if (!many) double_inputs<Input>(g, a, token, block, doubled);
    for (int64_t t = first; t < last; ++t) {
      const uint8_t* tile = weights + t * layout.bytes;
      const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
      const float* part = bias ? bias + row : nullptr;
      if (many) {
        many_tokens<Form, Input>(tile, layout, g, a, part, y + row, scratch, token, block, rows);
      } else {
        run[block](tile, layout, g, a, doubled, part, y + row, token, rows);
      }
    }
  }
}

}  // namespace

void product_avx2(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                  uint8_t* scratch, int64_t first, int64_t last) {
  with_form<Bytes, Words>(g, a, [&](auto form, auto inputs) {
    product<decltype(form), decltype(inputs)>(weights, g, a, bias, y, scratch, first, last);
  });
}

}  // namespace bitwright
