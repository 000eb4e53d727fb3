// The product with AVX-512 BW and VNNI: one vpshufb turns 64 codes into levels, one vpdpbusd multiplies them; vpdpwssd
// where inputs have more than four bits.
//
// avx512_emulated.cpp builds this file with SIMDe, so that its arithmetic is tested on machines without AVX-512.
#ifdef BITWRIGHT_EMULATED
#define product_avx512 product_avx512_emulated
#endif

#include <cstring>
#include <type_traits>

#include "decode512.h"

namespace bitwright {

#ifdef BITWRIGHT_EMULATED
ProductFunction product_avx512_emulated;
#endif

namespace {

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

ALWAYS __m512i dot_words(__m512i sum, __m512i weights, __m512i x) {
#ifdef BITWRIGHT_EMULATED
  return _mm512_dpwssd_epi32(sum, weights, x);
#else
  asm("vpdpwssd %2,%1,%0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
#endif
}

// Inputs of up to four bits.
struct Bytes {
  static constexpr int64_t kUnit = 1;  // bytes of an input

  static ALWAYS const void* codes(const Activations& a) { return a.codes; }

  static ALWAYS __m512i multiply(__m512i sum, __m512i w, __m512i x) { return dot(sum, w, x); }

  // 64 channels of four slots; two chains of sums hide the latency of the multiply.
  static ALWAYS void channels(const __m512i* w, const int8_t* v, __m512i& even, __m512i& odd) {
    even = dot(even, w[0], lanes(v));
    odd = dot(odd, w[1], lanes(v + 16));
    even = dot(even, w[2], lanes(v + 32));
    odd = dot(odd, w[3], lanes(v + 48));
  }

  // Four channels of sixteen rows into the cache.
  static ALWAYS void put(uint8_t* quads, int64_t quad, __m512i v) { store(quads + quad * 128, v); }
};

// Inputs of up to eight bits, -255..255.
struct Words {
  static constexpr int64_t kUnit = 2;

  static ALWAYS const void* codes(const Activations& a) { return a.words; }

  static ALWAYS __m512i multiply(__m512i sum, __m512i w, __m512i x) { return dot_words(sum, w, x); }

  static ALWAYS void channels(const __m512i* w, const int8_t* v, __m512i& even, __m512i& odd) {
    const __m512i none = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < 4; ++i) {
      even = dot_words(even, _mm512_unpacklo_epi8(w[i], none), lanes(v + i * 32));
      odd = dot_words(odd, _mm512_unpackhi_epi8(w[i], none), lanes(v + i * 32 + 16));
    }
  }

  static ALWAYS void put(uint8_t* quads, int64_t quad, __m512i v) {
    // The two lower bytes of each dword as words, then the two upper ones; a byte of 0x80 gives a zero.
    alignas(16) static const uint8_t kFirst[16] = {0, 128, 1, 128, 4, 128, 5, 128, 8, 128, 9, 128, 12, 128, 13, 128};
    alignas(16) static const uint8_t kLast[16] = {2, 128, 3, 128, 6, 128, 7, 128, 10, 128, 11, 128, 14, 128, 15, 128};
    store(quads + quad * 256, _mm512_shuffle_epi8(v, lanes(kFirst)));
    store(quads + quad * 256 + 128, _mm512_shuffle_epi8(v, lanes(kLast)));
  }
};

// Four vectors of four slots, four partial sums each -> the sums of sixteen rows in order.
ALWAYS __m512i in_row_order(__m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v0, v1), _mm512_unpackhi_epi32(v0, v1));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v2, v3), _mm512_unpackhi_epi32(v2, v3));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// What the offset of stored weights adds to the sums of sixteen rows, taken off: 128 a channel, or the row's zero point.
template <typename Form>
ALWAYS __m512i without_offset(__m512i sum, const uint8_t* group, int64_t half, int32_t shift) {
  if constexpr (Form::kTable) {
    return _mm512_add_epi32(sum, _mm512_set1_epi32(shift));
  } else {
    alignas(64) int32_t zeros[16];
    for (int64_t i = 0; i < 16; ++i) zeros[i] = group[Form::kLevels + half * 16 + i];
    const __m512i zero = _mm512_loadu_si512(reinterpret_cast<const void*>(zeros));
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(shift / 128)));  // exact: a multiple of 128
  }
}

template <typename Form>
ALWAYS __m512 add_group(__m512 f, __m512i sum, __m512 scale, const uint8_t* group, const Geometry& g, int64_t half,
                        int64_t index, const Activations& a, int64_t at) {
  const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(a.step[at]));
  f = _mm512_fmadd_ps(to_float(without_offset<Form>(sum, group, half, a.shift[at])), factor, f);
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

// Decode of up to four tokens: weights go through registers once and meet every token there. kSteps: times 64
// channels in a group, 0: any number.
template <typename Form, typename Input, int kTokens, int kSteps>
void few_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                const float* bias, float* y, int64_t first, int64_t rows) {
  const Decoder d;
  const int64_t steps = kSteps ? kSteps : g.width() / kStep, line = Form::kLines * 64;
  const int64_t bytes = steps * kStep * Input::kUnit;
  __m512 f[2][kTokens];
  UNROLL for (int i = 0; i < kTokens; ++i) f[0][i] = f[1][i] = _mm512_setzero_ps();
  for (int64_t l = 0; l < g.groups(); ++l) {
    const uint8_t* group = tile + l * layout.group_bytes;
    const int64_t at = l * a.tokens + first;
    const int8_t* x = static_cast<const int8_t*>(Input::codes(a)) + at * bytes;
    UNROLL for (int half = 0; half < 2; ++half) {
      __m512i sums[kTokens][4];
      UNROLL for (int i = 0; i < 4; ++i) {
        const Tables<Form> tables(group + Form::kLevels + (half * 4 + i) * 4 * Form::kLevelBytes, d);
        const uint8_t* codes = group + Form::kCodes + (half * 4 + i) * steps * line;
        __m512i even[kTokens], odd[kTokens];
        UNROLL for (int t = 0; t < kTokens; ++t) even[t] = odd[t] = _mm512_setzero_si512();
        UNROLL_TWO for (int64_t step = 0; step < steps; ++step) {
          const Weights<Form> weights(codes + step * line, tables, d);
          UNROLL for (int t = 0; t < kTokens; ++t) {
            Input::channels(weights.w, x + t * bytes + step * kStep * Input::kUnit, even[t], odd[t]);
          }
        }
        UNROLL for (int t = 0; t < kTokens; ++t) sums[t][i] = _mm512_add_epi32(even[t], odd[t]);
      }
      const __m512 scale = halves(group + Form::kScales + half * 32);
      UNROLL for (int t = 0; t < kTokens; ++t) {
        const __m512i sum = in_row_order(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
        f[half][t] = add_group<Form>(f[half][t], sum, scale, group, g, half, l, a, at + t);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* out = y + (first + t) * g.rows;
    finish(f[0][t], tile, layout, g, a, first + t, 0, bias, out, rows);
    if (rows > 16) finish(f[1][t], tile, layout, g, a, first + t, 1, bias ? bias + 16 : nullptr, out + 16, rows - 16);
  }
}

// A group of 32 rows as bytes [channels / 4][32][4]: what one broadcast of four channels multiplies. Where inputs are
// words, as words [channels / 2][32][2].
template <typename Form, typename Input>
void decode_group(const uint8_t* group, const Geometry& g, uint8_t* out) {
  const Decoder d;
  const int64_t steps = g.width() / kStep, line = Form::kLines * 64;
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t step = 0; step < steps; ++step) {
      __m512i w[4][4];  // [i][part]
      UNROLL for (int i = 0; i < 4; ++i) {
        const Tables<Form> tables(group + Form::kLevels + (half * 4 + i) * 4 * Form::kLevelBytes, d);
        const Weights<Form> weights(group + Form::kCodes + ((half * 4 + i) * steps + step) * line, tables, d);
        UNROLL for (int part = 0; part < 4; ++part) w[i][part] = weights.w[part];
      }
      UNROLL for (int part = 0; part < 4; ++part) {
        const __m512i a = _mm512_unpacklo_epi32(w[0][part], w[1][part]), b = _mm512_unpacklo_epi32(w[2][part], w[3][part]);
        const __m512i c = _mm512_unpackhi_epi32(w[0][part], w[1][part]), e = _mm512_unpackhi_epi32(w[2][part], w[3][part]);
        uint8_t* quads = out + (step * 16 + part * 4) * 128 * Input::kUnit + half * 64;
        Input::put(quads, 0, _mm512_unpacklo_epi64(a, b));
        Input::put(quads, 1, _mm512_unpackhi_epi64(a, b));
        Input::put(quads, 2, _mm512_unpacklo_epi64(c, e));
        Input::put(quads, 3, _mm512_unpackhi_epi64(c, e));
      }
    }
  }
}

// 32 rows times kTokens tokens over a decoded group, all sums in registers, then one float step each.
template <typename Form, typename Input, int kTokens>
ALWAYS void multiply(const uint8_t* w, const Geometry& g, const Activations& a, const uint8_t* group, int64_t l,
                     int64_t at, __m512 scale0, __m512 scale1, float* f) {
  const int64_t bytes = g.width() * Input::kUnit;
  const int8_t* x = static_cast<const int8_t*>(Input::codes(a)) + at * bytes;
  __m512i sum0[kTokens], sum1[kTokens];
  UNROLL for (int i = 0; i < kTokens; ++i) sum0[i] = sum1[i] = _mm512_setzero_si512();
  for (int64_t place = 0; place < bytes; place += 4, w += 128) {
    const __m512i w0 = load(w), w1 = load(w + 64);
    UNROLL for (int i = 0; i < kTokens; ++i) {
      const __m512i value = broadcast(x + i * bytes + place);
      sum0[i] = Input::multiply(sum0[i], w0, value);
      sum1[i] = Input::multiply(sum1[i], w1, value);
    }
  }
  UNROLL for (int i = 0; i < kTokens; ++i) {
    float* out = f + i * kTileRows;
    _mm512_storeu_ps(out, add_group<Form>(_mm512_loadu_ps(out), sum0[i], scale0, group, g, 0, l, a, at + i));
    _mm512_storeu_ps(out + 16, add_group<Form>(_mm512_loadu_ps(out + 16), sum1[i], scale1, group, g, 1, l, a, at + i));
  }
}

template <typename Form, typename Input>
void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  float* f = reinterpret_cast<float*>(scratch + kTileRows * g.width() * Input::kUnit);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t l = 0; l < g.groups(); ++l) {
    const uint8_t* group = tile + l * layout.group_bytes;
    decode_group<Form, Input>(group, g, scratch);
    const __m512 scale0 = halves(group + Form::kScales), scale1 = halves(group + Form::kScales + 32);
    const int64_t at = l * a.tokens + first;
    int64_t i = 0;
    const auto some = [&](auto count) {
      multiply<Form, Input, count()>(scratch, g, a, group, l, at + i, scale0, scale1, f + i * kTileRows);
      i += count();
    };
    while (i + 12 <= tokens) some(std::integral_constant<int, 12>{});
    while (i + 4 <= tokens) some(std::integral_constant<int, 4>{});
    while (i < tokens) some(std::integral_constant<int, 1>{});
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

// By number of tokens; kSteps as in few_tokens.
template <typename Form, typename Input, int kSteps>
constexpr Few few[kFewTokens + 1] = {nullptr, few_tokens<Form, Input, 1, kSteps>, few_tokens<Form, Input, 2, kSteps>,
                                     few_tokens<Form, Input, 3, kSteps>, few_tokens<Form, Input, 4, kSteps>};
constexpr int64_t kFew = 8;  // tokens from which on decoding into the cache is faster

template <typename Form, typename Input>
void product(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
             uint8_t* scratch, int64_t first, int64_t last) {
  const TileLayout layout(g);
  const Few* run = few<Form, Input, 0>;
  // Groups of 128 have a copy of their own for the codes and inputs that there are most of.
  if constexpr (std::is_same_v<Form, Pairs> && std::is_same_v<Input, Bytes>) {
    if (g.width() == 2 * kStep) run = few<Form, Input, 2>;
  }
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* tile = weights + t * layout.bytes;
    const int64_t row = t * kTileRows, rows = smaller<int64_t>(kTileRows, g.rows - row);
    const float* part = bias ? bias + row : nullptr;
    const bool many = a.tokens > kFew;
    for (int64_t token = 0, block; token < a.tokens; token += block) {
      block = smaller(many ? kTokenBlock : kFewTokens, a.tokens - token);
      if (many) {
        many_tokens<Form, Input>(tile, layout, g, a, part, y + row, scratch, token, block, rows);
      } else {
        run[block](tile, layout, g, a, part, y + row, token, rows);
      }
    }
  }
}

}  // namespace

void product_avx512(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                    uint8_t* scratch, int64_t first, int64_t last) {
  with_form<Bytes, Words>(g, a, [&](auto form, auto inputs) {
    product<decltype(form), decltype(inputs)>(weights, g, a, bias, y, scratch, first, last);
  });
}

}  // namespace bitwright
