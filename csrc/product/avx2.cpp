// The product with AVX2 and FMA: a byte shuffle turns codes into levels, vpmaddubsw multiplies them.
//
// vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits. Weights are the unsigned bytes (level +
// 128), inputs the signed ones (-15..15): four such pairs stay below 4 * 2 * 255 * 15 = 30,600 and fit.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

constexpr int64_t kGroupsAhead = 4;  // that few_tokens asks memory for: 5 KB with groups of 128

#define ALWAYS inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

ALWAYS __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

ALWAYS void store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

ALWAYS __m256i broadcast(const int8_t* p) {
  int four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

ALWAYS __m256 halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// A lane holds one slot's codes of 64 channels, four to a byte. A nibble holds two codes, so a table of sixteen bytes
// says the level of either: one table for the lower code, one for the upper, and no shift between them.
struct Decoder {
  __m256i nibble = _mm256_set1_epi8(15);
  __m256i lower = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,  //
                                   4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  __m256i upper = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                   4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
};

struct Tables {
  __m256i lower, upper;

  ALWAYS Tables(const uint8_t* levels, const Decoder& d) {  // of two slots
    int64_t eight;
    std::memcpy(&eight, levels, 8);
    const __m256i both = _mm256_set1_epi64x(eight);
    lower = _mm256_shuffle_epi8(both, d.lower);
    upper = _mm256_shuffle_epi8(both, d.upper);
  }
};

struct Weights {
  __m256i w[4];  // channels 0-15, 16-31, 32-47, 48-63 of two slots

  ALWAYS Weights(__m256i codes, const Tables& t, const Decoder& d) {
    const __m256i low = _mm256_and_si256(codes, d.nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), d.nibble);
    w[0] = _mm256_shuffle_epi8(t.lower, low);
    w[1] = _mm256_shuffle_epi8(t.upper, low);
    w[2] = _mm256_shuffle_epi8(t.lower, high);
    w[3] = _mm256_shuffle_epi8(t.upper, high);
  }
};

ALWAYS __m256i four_products(const __m256i* w, __m256i x0, __m256i x1, __m256i x2, __m256i x3) {
  const __m256i a = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], x0), _mm256_maddubs_epi16(w[1], x1));
  const __m256i b = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], x2), _mm256_maddubs_epi16(w[3], x3));
  return _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1));
}

// What is done once a group: f = fma(D, scale * step, f), and the part of inputs outside 0..15 where there is one.
ALWAYS __m256 add_group(__m256 f, __m256i sum, __m256 scale, const Activations& a, int64_t at) {
  const __m256i all = _mm256_add_epi32(sum, _mm256_set1_epi32(a.shift[at]));
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
// inputs with every 16 bytes twice, [token][group][width * 2]; kLines: lines of 64 channels in a group, 0: any number.
template <int kTokens, int kLines>
void few_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                const int8_t* x, const float* bias, float* y, int64_t first, int64_t rows) {
  const Decoder d;
  const int64_t lines = kLines ? kLines : g.width() / kStep, stride = g.groups() * g.width() * 2;
  __m256 f[kTokens][4];
  UNROLL for (int t = 0; t < kTokens; ++t) UNROLL for (int r = 0; r < 4; ++r) f[t][r] = _mm256_setzero_ps();
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    const int8_t* inputs = x + index * g.width() * 2;
    const int64_t at = index * a.tokens + first;
    const uint8_t* ahead = group + kGroupsAhead * layout.group_bytes;
    prefetch(ahead, TileLayout::kCodes);
    for (int64_t sixteen = 0; sixteen < 2; ++sixteen) {
      __m256i sums[2][kTokens][4];
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t slot = sixteen * 16 + i * 4 + half * 2;
        const Tables tables(group + TileLayout::kLevels + slot * 4, d);
        const int64_t place = TileLayout::kCodes + (sixteen * 4 + i) * lines * 64;
        const uint8_t* codes = group + place + half * 32;
        if (half == 0) prefetch(ahead + place, lines * 64);
        __m256i sum[kTokens];
        UNROLL for (int t = 0; t < kTokens; ++t) sum[t] = _mm256_setzero_si256();
        UNROLL for (int64_t line = 0; line < lines; ++line) {
          const Weights weights(load(codes + line * 64), tables, d);
          UNROLL for (int t = 0; t < kTokens; ++t) {
            const int8_t* v = inputs + t * stride + line * 128;
            sum[t] = _mm256_add_epi32(
                sum[t], four_products(weights.w, load(v), load(v + 32), load(v + 64), load(v + 96)));
          }
        }
        UNROLL for (int t = 0; t < kTokens; ++t) sums[half][t][i] = sum[t];
      }
      UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t r = sixteen * 2 + half;
        const __m256 scale = halves(group + TileLayout::kScales + r * 16);
        UNROLL for (int t = 0; t < kTokens; ++t) {
          const __m256i* v = sums[half][t];
          const __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
          f[t][r] = add_group(f[t][r], sum, scale, a, at + t);
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
void double_inputs(const Geometry& g, const Activations& a, int64_t first, int64_t tokens, int8_t* x) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t index = 0; index < g.groups(); ++index) {
      const int8_t* codes = a.codes + (index * a.tokens + first + t) * g.width();
      for (int64_t i = 0; i < g.width(); i += 16, x += 32) {
        store(x, _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
      }
    }
  }
}

// A group of 32 rows as bytes [channels / 4][32][4]: what one broadcast of four channels multiplies.
void decode_group(const uint8_t* group, const Geometry& g, uint8_t* out) {
  const Decoder d;
  const int64_t lines = g.width() / kStep;
  for (int64_t r = 0; r < 4; ++r) {
    const int64_t slot = r / 2 * 16 + r % 2 * 2;
    for (int64_t line = 0; line < lines; ++line) {
      __m256i w[4][4];  // [i][part]: slots side by side are rows r * 8 + i and r * 8 + 4 + i
      UNROLL for (int i = 0; i < 4; ++i) {
        const Tables tables(group + TileLayout::kLevels + (slot + i * 4) * 4, d);
        const int64_t at = (r / 2 * 4 + i) * lines + line;
        const Weights weights(load(group + TileLayout::kCodes + at * 64 + r % 2 * 32), tables, d);
        UNROLL for (int part = 0; part < 4; ++part) w[i][part] = weights.w[part];
      }
      UNROLL for (int part = 0; part < 4; ++part) {
        const __m256i a = _mm256_unpacklo_epi32(w[0][part], w[1][part]), b = _mm256_unpacklo_epi32(w[2][part], w[3][part]);
        const __m256i c = _mm256_unpackhi_epi32(w[0][part], w[1][part]), e = _mm256_unpackhi_epi32(w[2][part], w[3][part]);
        uint8_t* quads = out + (line * 16 + part * 4) * 128 + r * 32;
        store(quads, _mm256_unpacklo_epi64(a, b));
        store(quads + 128, _mm256_unpackhi_epi64(a, b));
        store(quads + 256, _mm256_unpacklo_epi64(c, e));
        store(quads + 384, _mm256_unpackhi_epi64(c, e));
      }
    }
  }
}

// Sixteen rows and sixteen channels in eight registers, multiplied with every token. Sums [token][32] are in memory
// between the calls of a group; the last one adds them to f [token][32].
template <bool kFirst, bool kLast>
void multiply_block(const uint8_t* w, const int8_t* x, int64_t width, int64_t tokens, int32_t* sums, float* f,
                    const uint8_t* scales, const Activations& a, int64_t at) {
  const __m256i top[4] = {load(w), load(w + 128), load(w + 256), load(w + 384)};
  const __m256i bottom[4] = {load(w + 32), load(w + 160), load(w + 288), load(w + 416)};
  const __m256 scale0 = halves(scales), scale1 = halves(scales + 16);
  for (int64_t token = 0; token < tokens; ++token, x += width, sums += kTileRows, f += kTileRows) {
    const __m256i x0 = broadcast(x), x1 = broadcast(x + 4), x2 = broadcast(x + 8), x3 = broadcast(x + 12);
    __m256i sum0 = four_products(top, x0, x1, x2, x3), sum1 = four_products(bottom, x0, x1, x2, x3);
    if (!kFirst) {
      sum0 = _mm256_add_epi32(sum0, load(sums));
      sum1 = _mm256_add_epi32(sum1, load(sums + 8));
    }
    if (kLast) {
      _mm256_store_ps(f, add_group(_mm256_load_ps(f), sum0, scale0, a, at + token));
      _mm256_store_ps(f + 8, add_group(_mm256_load_ps(f + 8), sum1, scale1, a, at + token));
    } else {
      store(sums, sum0);
      store(sums + 8, sum1);
    }
  }
}

// Prefill: a group of 32 rows is decoded once into the cache and multiplied with up to kTokenBlock tokens.
void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const int64_t width = g.width();
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + kTileRows * width);
  float* f = reinterpret_cast<float*>(sums + kTokenBlock * kTileRows);
  uint8_t* wide = reinterpret_cast<uint8_t*>(f + kTokenBlock * kTileRows);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    decode_group(group, g, scratch);
    const int64_t at = index * a.tokens + first, last = round_up(g.channels(index), 16) - 16;
    for (int64_t half = 0; half < 2; ++half) {
      const uint8_t *w = scratch + half * 64, *scales = group + TileLayout::kScales + half * 32;
      const int8_t* x = a.codes + at * width;
      int32_t* sum = sums + half * 16;
      float* out = f + half * 16;
      if (last == 0) {
        multiply_block<true, true>(w, x, width, tokens, sum, out, scales, a, at);
        continue;
      }
      multiply_block<true, false>(w, x, width, tokens, sum, out, scales, a, at);
      for (int64_t step = 16; step < last; step += 16) {
        multiply_block<false, false>(w + step * 32, x + step, width, tokens, sum, out, scales, a, at);
      }
      multiply_block<false, true>(w + last * 32, x + last, width, tokens, sum, out, scales, a, at);
    }
    for (int64_t token = 0; token < tokens; ++token) {
      if (__builtin_expect(a.rest[at + token] == 0.0f, 1)) continue;
      for (int64_t r = 0; r < 4; ++r) {
        float* out = f + token * kTileRows + r * 8;
        const __m256 scale = halves(group + TileLayout::kScales + r * 16);
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

// For groups of 128, for others; by number of tokens.
const Few few[2][kFewTokens + 1] = {
    {nullptr, few_tokens<1, 2>, few_tokens<2, 2>, few_tokens<3, 2>, few_tokens<4, 2>},
    {nullptr, few_tokens<1, 0>, few_tokens<2, 0>, few_tokens<3, 0>, few_tokens<4, 0>},
};
constexpr int64_t kFew = 12;  // tokens from which on decoding into the cache is faster

}  // namespace

void product_avx2(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                  uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  const bool many = a.tokens > kFew;
  for (int64_t token = 0, block; token < a.tokens; token += block) {
    block = smaller(many ? kTokenBlock : kFewTokens, a.tokens - token);
    if (!many) double_inputs(g, a, token, block, reinterpret_cast<int8_t*>(scratch));
    for (int64_t t = first; t < last; ++t) {
      const uint8_t* tile = weights + t * layout.bytes;
      const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
      const float* part = bias ? bias + row : nullptr;
      if (many) {
        many_tokens(tile, layout, g, a, part, y + row, scratch, token, block, rows);
      } else {
        few[g.width() == 2 * kStep ? 0 : 1][block](tile, layout, g, a, reinterpret_cast<int8_t*>(scratch), part, y + row, token,
                                          rows);
      }
    }
  }
}

}  // namespace bitwright
