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

#define ALWAYS inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

ALWAYS __m512i load(const uint8_t* p) { return _mm512_loadu_si512(reinterpret_cast<const void*>(p)); }

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

ALWAYS __m512i index(__m512i codes, __m512i mask, __m512i position) {  // (codes & mask) | position
#ifdef BITWRIGHT_EMULATED
  return _mm512_or_si512(_mm512_and_si512(codes, mask), position);
#else
  asm("vpternlogd $0xEA,%2,%1,%0" : "+v"(codes) : "v"(mask), "v"(position));
  return codes;
#endif
}

ALWAYS __m512i spread(int a, int b, int c, int d) {  // a 16-byte pattern in all four lanes
  return _mm512_set_epi32(d, c, b, a, d, c, b, a, d, c, b, a, d, c, b, a);
}

// As in avx2.cpp: a lane holds four rows of four channels; index = 4 * row + code, or row + 4 * code if transposed.
struct Indices {
  __m512i low = _mm512_set1_epi8(3), high = _mm512_set1_epi8(12);
  __m512i row4 = spread(0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c);
  __m512i row1 = spread(0x00000000, 0x01010101, 0x02020202, 0x03030303);
  __m512i transpose = spread(0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703);
};

struct Decoded {
  __m512i w[4];  // channels 0-3, 4-7, 8-11, 12-15 of sixteen rows
};

ALWAYS Decoded decode(__m512i codes, __m512i table, __m512i transposed, const Indices& k) {
  const __m512i next = _mm512_srli_epi16(codes, 4);
  Decoded d;
  d.w[0] = _mm512_shuffle_epi8(table, index(codes, k.low, k.row4));
  d.w[1] = _mm512_shuffle_epi8(transposed, index(codes, k.high, k.row1));
  d.w[2] = _mm512_shuffle_epi8(table, index(next, k.low, k.row4));
  d.w[3] = _mm512_shuffle_epi8(transposed, index(next, k.high, k.row1));
  return d;
}

ALWAYS __m512 add_group(__m512 f, __m512i sum, __m512 scale, const uint8_t* group, int64_t half, int64_t channels,
                        float step, float rest, int32_t shift) {
  const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(step));
  f = _mm512_fmadd_ps(to_float(_mm512_add_epi32(sum, _mm512_set1_epi32(shift))), factor, f);
  if (__builtin_expect(rest != 0.0f, 0)) {
    alignas(64) int32_t levels[16];
    for (int64_t i = 0; i < 16; ++i) levels[i] = level_sum(group, half * 16 + i, channels);
    const __m512i sums = _mm512_loadu_si512(reinterpret_cast<const void*>(levels));
    f = _mm512_fmadd_ps(to_float(sums), _mm512_mul_ps(factor, _mm512_set1_ps(rest)), f);
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

// Decode of up to eight tokens: a group goes through registers once and meets every token there.
template <int kTokens>
void few_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                const float* bias, float* y, int64_t first, int64_t rows) {
  const Indices k;
  const int64_t width = g.width();
  __m512 f0[kTokens], f1[kTokens];
  UNROLL for (int i = 0; i < kTokens; ++i) f0[i] = f1[i] = _mm512_setzero_ps();
  for (int64_t l = 0; l < g.groups(); ++l) {
    const uint8_t* group = tile + l * layout.group_bytes;
    const int64_t at = l * a.tokens + first;
    const int8_t* x = a.codes + at * width;
    const __m512i t0 = load(group), t1 = load(group + 64);
    const __m512i s0 = _mm512_shuffle_epi8(t0, k.transpose), s1 = _mm512_shuffle_epi8(t1, k.transpose);
    const __m512 scale0 = halves(group + TileLayout::kScales), scale1 = halves(group + TileLayout::kScales + 32);
    __m512i sum0[kTokens], sum1[kTokens], more0 = _mm512_setzero_si512(), more1 = more0;
    UNROLL for (int i = 0; i < kTokens; ++i) sum0[i] = sum1[i] = _mm512_setzero_si512();
    for (int64_t step = 0; step < width; step += kStep) {
      const uint8_t* codes = group + TileLayout::kCodes + step * 8;
      const Decoded d = decode(load(codes), t0, s0, k), e = decode(load(codes + 64), t1, s1, k);
      UNROLL for (int i = 0; i < kTokens; ++i) {
        const int8_t* xi = x + i * width + step;
        UNROLL for (int part = 0; part < 4; ++part) {
          const __m512i value = broadcast(xi + part * 4);
          if (kTokens == 1 && part % 2) {  // two chains of sums hide the latency of the multiply
            more0 = dot(more0, d.w[part], value);
            more1 = dot(more1, e.w[part], value);
          } else {
            sum0[i] = dot(sum0[i], d.w[part], value);
            sum1[i] = dot(sum1[i], e.w[part], value);
          }
        }
      }
    }
    if (kTokens == 1) {
      sum0[0] = _mm512_add_epi32(sum0[0], more0);
      sum1[0] = _mm512_add_epi32(sum1[0], more1);
    }
    UNROLL for (int i = 0; i < kTokens; ++i) {
      const float st = a.step[at + i], rest = a.rest[at + i];
      f0[i] = add_group(f0[i], sum0[i], scale0, group, 0, g.channels(l), st, rest, a.shift[at + i]);
      f1[i] = add_group(f1[i], sum1[i], scale1, group, 1, g.channels(l), st, rest, a.shift[at + i]);
    }
  }
  for (int i = 0; i < kTokens; ++i) {
    float* out = y + (first + i) * g.rows;
    finish(f0[i], tile, layout, g, a, first + i, 0, bias, out, rows);
    if (rows > 16) finish(f1[i], tile, layout, g, a, first + i, 1, bias ? bias + 16 : nullptr, out + 16, rows - 16);
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
    const float step = a.step[at + i], rest = a.rest[at + i];
    const int32_t shift = a.shift[at + i];
    _mm512_storeu_ps(out, add_group(_mm512_loadu_ps(out), sum0[i], scale0, group, 0, g.channels(l), step, rest, shift));
    _mm512_storeu_ps(out + 16,
                     add_group(_mm512_loadu_ps(out + 16), sum1[i], scale1, group, 1, g.channels(l), step, rest, shift));
  }
}

void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const Indices k;
  const int64_t width = g.width();
  float* f = reinterpret_cast<float*>(scratch + kTileRows * width);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t l = 0; l < g.groups(); ++l) {
    const uint8_t* group = tile + l * layout.group_bytes;
    const __m512i t0 = load(group), t1 = load(group + 64);
    const __m512i s0 = _mm512_shuffle_epi8(t0, k.transpose), s1 = _mm512_shuffle_epi8(t1, k.transpose);
    for (int64_t step = 0; step < width; step += kStep) {
      const uint8_t* codes = group + TileLayout::kCodes + step * 8;
      const Decoded d = decode(load(codes), t0, s0, k), e = decode(load(codes + 64), t1, s1, k);
      UNROLL for (int i = 0; i < 4; ++i) {
        uint8_t* out = scratch + step * 32 + i * 128;
        _mm512_storeu_si512(reinterpret_cast<void*>(out), d.w[i]);
        _mm512_storeu_si512(reinterpret_cast<void*>(out + 64), e.w[i]);
      }
    }
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

}  // namespace

void product_avx512(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                    uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  using Few = void (*)(const uint8_t*, const TileLayout&, const Geometry&, const Activations&, const float*, float*,
                       int64_t, int64_t);
  static const Few few[9] = {nullptr,         few_tokens<1>, few_tokens<2>, few_tokens<3>, few_tokens<4>,
                             few_tokens<5>, few_tokens<6>, few_tokens<7>, few_tokens<8>};
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* tile = weights + t * layout.bytes;
    const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
    const float* part = bias ? bias + row : nullptr;
    if (a.tokens <= 8) {
      few[a.tokens](tile, layout, g, a, part, y + row, 0, rows);
      continue;
    }
    for (int64_t token = 0; token < a.tokens; token += kTokenBlock) {
      many_tokens(tile, layout, g, a, part, y + row, scratch, token, smaller(kTokenBlock, a.tokens - token), rows);
    }
  }
}

}  // namespace bitwright
