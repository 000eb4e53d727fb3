// The product with AVX-512 BW and VNNI: one vpshufb turns 64 codes into levels, one vpdpbusd multiplies them.
//
// avx512_emulated.cpp builds this file with SIMDe, so that its arithmetic is tested on machines without AVX-512.
#ifdef BITWRIGHT_EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/f16c.h>
#define product_avx512 product_avx512_emulated
#else
#include <immintrin.h>
#endif

#include <cstring>

#include "kernels.h"

namespace bitwright {

#ifdef BITWRIGHT_EMULATED
ProductFunction product_avx512_emulated;
#endif

namespace {

#ifdef BITWRIGHT_EMULATED  // every instruction is a page of code there: one copy of it, not hundreds
#define ALWAYS __attribute__((noinline))
#define UNROLL
#else
#define ALWAYS inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#endif

ALWAYS __m512i load(const uint8_t* p) { return _mm512_loadu_si512(reinterpret_cast<const void*>(p)); }

ALWAYS void store(uint8_t* p, __m512i v) { _mm512_storeu_si512(reinterpret_cast<void*>(p), v); }

ALWAYS __m512i broadcast(const int8_t* p) {
  int four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

ALWAYS __m512 halves(const uint8_t* p) {
#ifdef BITWRIGHT_EMULATED
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
  alignas(64) float values[16];
  _mm256_storeu_ps(values, low);
  _mm256_storeu_ps(values + 8, high);
  return _mm512_loadu_ps(values);
#else
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
}

ALWAYS __m512 to_float(__m512i integers) {
#ifdef BITWRIGHT_EMULATED  // SIMDe 0.7.4 lacks this one
  alignas(64) int32_t from[16];
  alignas(64) float to[16];
  _mm512_storeu_si512(reinterpret_cast<void*>(from), integers);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(from[i]);
  return _mm512_loadu_ps(to);
#else
  return _mm512_cvtepi32_ps(integers);
#endif
}

// gcc 12 spills accumulators around the builtins of these two; as single instructions they stay in registers.
ALWAYS __m512i dot(__m512i sum, __m512i weights, __m512i x) {
#ifdef BITWRIGHT_EMULATED
  return _mm512_dpbusd_epi32(sum, weights, x);
#else
  asm("vpdpbusd %2,%1,%0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
#endif
}

ALWAYS __m512i spread(int a, int b, int c, int d) {  // four bytes a lane
  return _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
}

// A 16-byte pattern in all four lanes.
ALWAYS __m512i lanes(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// As in avx2.cpp: a lane holds one slot's codes of 64 channels; a table for the lower code of a nibble, one for the upper.
struct Decoder {
  __m512i nibble = _mm512_set1_epi8(15);
  __m512i lower = spread(0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c);
  __m512i upper = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909,
                                   0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202,
                                   0x01010101, 0x00000000);
};

struct Tables {
  __m512i lower, upper;

  ALWAYS Tables(const uint8_t* levels, const Decoder& d) {  // of four slots
    const __m512i all = lanes(levels);
    lower = _mm512_shuffle_epi8(all, d.lower);
    upper = _mm512_shuffle_epi8(all, d.upper);
  }
};

struct Weights {
  __m512i w[4];  // channels 0-15, 16-31, 32-47, 48-63 of four slots

  ALWAYS Weights(__m512i codes, const Tables& t, const Decoder& d) {
    const __m512i low = _mm512_and_si512(codes, d.nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), d.nibble);
    w[0] = _mm512_shuffle_epi8(t.lower, low);
    w[1] = _mm512_shuffle_epi8(t.upper, low);
    w[2] = _mm512_shuffle_epi8(t.lower, high);
    w[3] = _mm512_shuffle_epi8(t.upper, high);
  }
};

// Four vectors of four slots, four partial sums each -> the sums of sixteen rows in order.
ALWAYS __m512i in_row_order(__m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v0, v1), _mm512_unpackhi_epi32(v0, v1));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v2, v3), _mm512_unpackhi_epi32(v2, v3));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

ALWAYS __m512 add_group(__m512 f, __m512i sum, __m512 scale, const uint8_t* group, const Geometry& g, int64_t half,
                        int64_t index, const Activations& a, int64_t at) {
  const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(a.step[at]));
  f = _mm512_fmadd_ps(to_float(_mm512_add_epi32(sum, _mm512_set1_epi32(a.shift[at]))), factor, f);
  if (__builtin_expect(a.rest[at] != 0.0f, 0)) {
    alignas(64) int32_t levels[16];
    for (int64_t i = 0; i < 16; ++i) levels[i] = level_sum(group, g, half * 16 + i, index);
    const __m512i sums = _mm512_loadu_si512(reinterpret_cast<const void*>(levels));
    f = _mm512_fmadd_ps(to_float(sums), _mm512_mul_ps(factor, _mm512_set1_ps(a.rest[at])), f);
  }
  return f;
}

ALWAYS void finish(__m512 f, const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                   int64_t token, int64_t half, const float* bias, float* y, int64_t rows) {
  if (g.outliers) {
    const int8_t* codes = a.outliers + token * g.outlier_width();
    const uint8_t* w = tile + layout.outliers_at + half * 64;
    __m512i even = _mm512_setzero_si512(), odd = even;
    int64_t channel = 0;
    for (; channel + 8 <= g.outlier_width(); channel += 8) {
      even = dot(even, load(w + channel * 32), broadcast(codes + channel));
      odd = dot(odd, load(w + channel * 32 + 128), broadcast(codes + channel + 4));
    }
    if (channel < g.outlier_width()) even = dot(even, load(w + channel * 32), broadcast(codes + channel));
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(even, odd), _mm512_set1_epi32(a.outlier_shift[token]));
    const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(tile + layout.outlier_scales_at) + half * 16);
    const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(a.outlier_step[token]));
    f = _mm512_fmadd_ps(to_float(sum), factor, f);
  }
  if (rows >= 16) {
    if (bias) f = _mm512_add_ps(f, _mm512_loadu_ps(bias));
    _mm512_storeu_ps(y, f);
    return;
  }
  alignas(64) float values[16];
  _mm512_storeu_ps(values, f);
  for (int64_t i = 0; i < rows; ++i) y[i] = bias ? values[i] + bias[i] : values[i];
}

// Decode of up to four tokens: weights go through registers once and meet every token there. kLines: lines of 64
// channels in a group, 0: any number.
template <int kTokens, int kLines>
void few_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                const float* bias, float* y, int64_t first, int64_t rows) {
  const Decoder d;
  const int64_t width = g.width(), lines = kLines ? kLines : width / kStep;
  __m512 f[2][kTokens];
  UNROLL for (int i = 0; i < kTokens; ++i) f[0][i] = f[1][i] = _mm512_setzero_ps();
  for (int64_t l = 0; l < g.groups(); ++l) {
    const uint8_t* group = tile + l * layout.group_bytes;
    const int64_t at = l * a.tokens + first;
    const int8_t* x = a.codes + at * width;
    UNROLL for (int half = 0; half < 2; ++half) {
      __m512i sums[kTokens][4];
      UNROLL for (int i = 0; i < 4; ++i) {
        const Tables tables(group + TileLayout::kLevels + (half * 4 + i) * 16, d);
        const uint8_t* codes = group + TileLayout::kCodes + (half * 4 + i) * lines * 64;
        __m512i even[kTokens], odd[kTokens];  // two chains of sums hide the latency of the multiply
        UNROLL for (int t = 0; t < kTokens; ++t) even[t] = odd[t] = _mm512_setzero_si512();
        UNROLL for (int64_t line = 0; line < lines; ++line) {
          const Weights weights(load(codes + line * 64), tables, d);
          UNROLL for (int t = 0; t < kTokens; ++t) {
            const int8_t* v = x + t * width + line * kStep;
            even[t] = dot(even[t], weights.w[0], lanes(v));
            odd[t] = dot(odd[t], weights.w[1], lanes(v + 16));
            even[t] = dot(even[t], weights.w[2], lanes(v + 32));
            odd[t] = dot(odd[t], weights.w[3], lanes(v + 48));
          }
        }
        UNROLL for (int t = 0; t < kTokens; ++t) sums[t][i] = _mm512_add_epi32(even[t], odd[t]);
      }
      const __m512 scale = halves(group + TileLayout::kScales + half * 32);
      UNROLL for (int t = 0; t < kTokens; ++t) {
        const __m512i sum = in_row_order(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
        f[half][t] = add_group(f[half][t], sum, scale, group, g, half, l, a, at + t);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* out = y + (first + t) * g.rows;
    finish(f[0][t], tile, layout, g, a, first + t, 0, bias, out, rows);
    if (rows > 16) finish(f[1][t], tile, layout, g, a, first + t, 1, bias ? bias + 16 : nullptr, out + 16, rows - 16);
  }
}

// A group of 32 rows as bytes [channels / 4][32][4]: what one broadcast of four channels multiplies.
void decode_group(const uint8_t* group, const Geometry& g, uint8_t* out) {
  const Decoder d;
  const int64_t lines = g.width() / kStep;
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t line = 0; line < lines; ++line) {
      __m512i w[4][4];  // [i][part]
      UNROLL for (int i = 0; i < 4; ++i) {
        const Tables tables(group + TileLayout::kLevels + (half * 4 + i) * 16, d);
        const Weights weights(load(group + TileLayout::kCodes + ((half * 4 + i) * lines + line) * 64), tables, d);
        UNROLL for (int part = 0; part < 4; ++part) w[i][part] = weights.w[part];
      }
      UNROLL for (int part = 0; part < 4; ++part) {
        const __m512i a = _mm512_unpacklo_epi32(w[0][part], w[1][part]), b = _mm512_unpacklo_epi32(w[2][part], w[3][part]);
        const __m512i c = _mm512_unpackhi_epi32(w[0][part], w[1][part]), e = _mm512_unpackhi_epi32(w[2][part], w[3][part]);
        uint8_t* quads = out + (line * 16 + part * 4) * 128 + half * 64;
        store(quads, _mm512_unpacklo_epi64(a, b));
        store(quads + 128, _mm512_unpackhi_epi64(a, b));
        store(quads + 256, _mm512_unpacklo_epi64(c, e));
        store(quads + 384, _mm512_unpackhi_epi64(c, e));
      }
    }
  }
}

// 32 rows times kTokens tokens over a decoded group, all sums in registers, then one float step each.
template <int kTokens>
ALWAYS void multiply(const uint8_t* w, const Geometry& g, const Activations& a, const uint8_t* group, int64_t l,
                     int64_t at, __m512 scale0, __m512 scale1, float* f) {
  const int64_t width = g.width();
  const int8_t* x = a.codes + at * width;
  __m512i sum0[kTokens], sum1[kTokens];
  UNROLL for (int i = 0; i < kTokens; ++i) sum0[i] = sum1[i] = _mm512_setzero_si512();
  for (int64_t channel = 0; channel < width; channel += 4, w += 128) {
    const __m512i w0 = load(w), w1 = load(w + 64);
    UNROLL for (int i = 0; i < kTokens; ++i) {
      const __m512i value = broadcast(x + i * width + channel);
      sum0[i] = dot(sum0[i], w0, value);
      sum1[i] = dot(sum1[i], w1, value);
    }
  }
  UNROLL for (int i = 0; i < kTokens; ++i) {
    float* out = f + i * kTileRows;
    _mm512_storeu_ps(out, add_group(_mm512_loadu_ps(out), sum0[i], scale0, group, g, 0, l, a, at + i));
    _mm512_storeu_ps(out + 16, add_group(_mm512_loadu_ps(out + 16), sum1[i], scale1, group, g, 1, l, a, at + i));
  }
}

void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const int64_t width = g.width();
  float* f = reinterpret_cast<float*>(scratch + kTileRows * width);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t l = 0; l < g.groups(); ++l) {
    const uint8_t* group = tile + l * layout.group_bytes;
    decode_group(group, g, scratch);
    const __m512 scale0 = halves(group + TileLayout::kScales), scale1 = halves(group + TileLayout::kScales + 32);
    const int64_t at = l * a.tokens + first;
    int64_t i = 0;
    for (; i + 12 <= tokens; i += 12) multiply<12>(scratch, g, a, group, l, at + i, scale0, scale1, f + i * kTileRows);
    for (; i + 4 <= tokens; i += 4) multiply<4>(scratch, g, a, group, l, at + i, scale0, scale1, f + i * kTileRows);
    for (; i < tokens; ++i) multiply<1>(scratch, g, a, group, l, at + i, scale0, scale1, f + i * kTileRows);
  }
  for (int64_t i = 0; i < tokens; ++i) {
    const float* sums = f + i * kTileRows;
    float* out = y + (first + i) * g.rows;
    finish(_mm512_loadu_ps(sums), tile, layout, g, a, first + i, 0, bias, out, rows);
    if (rows > 16) {
      finish(_mm512_loadu_ps(sums + 16), tile, layout, g, a, first + i, 1, bias ? bias + 16 : nullptr, out + 16,
             rows - 16);
    }
  }
}

using Few = void (*)(const uint8_t*, const TileLayout&, const Geometry&, const Activations&, const float*, float*,
                     int64_t, int64_t);

// For groups of 128, for others; by number of tokens.
const Few few[2][kFewTokens + 1] = {
    {nullptr, few_tokens<1, 2>, few_tokens<2, 2>, few_tokens<3, 2>, few_tokens<4, 2>},
    {nullptr, few_tokens<1, 0>, few_tokens<2, 0>, few_tokens<3, 0>, few_tokens<4, 0>},
};
constexpr int64_t kFew = 8;  // tokens from which on decoding into the cache is faster

}  // namespace

void product_avx512(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                    uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* tile = weights + t * layout.bytes;
    const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
    const float* part = bias ? bias + row : nullptr;
    const bool many = a.tokens > kFew;
    for (int64_t token = 0, block; token < a.tokens; token += block) {
      block = smaller(many ? kTokenBlock : kFewTokens, a.tokens - token);
      if (many) {
        many_tokens(tile, layout, g, a, part, y + row, scratch, token, block, rows);
      } else {
        few[g.width() == 2 * kStep ? 0 : 1][block](tile, layout, g, a, part, y + row, token, rows);
      }
    }
  }
}

}  // namespace bitwright
