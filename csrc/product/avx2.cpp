// The product with AVX2 and FMA: a byte shuffle turns codes into levels, vpmaddubsw multiplies them.
//
// vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits. Weights are the unsigned bytes (level +
// 128), inputs the signed ones (-15..15): four such pairs stay below 4 * 2 * 255 * 15 = 30,600 and fit.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

inline __m256i load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast(const int8_t* p) {
  int four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

inline __m256 halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Masks and positions that turn a byte of four codes into shuffle indices. A 16-byte lane holds four rows of four
// channels, so its table is the sixteen levels of four rows: index = 4 * row + code, or row + 4 * code in the
// transposed table, which spares the shift for every second code.
struct Indices {
  __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12);
  __m256i row4 = _mm256_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12,  //
                                  0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
  __m256i row1 = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                  0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m256i transpose = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                       0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
};

struct Decoded {
  __m256i w[4];  // channels 0-3, 4-7, 8-11, 12-15 of eight rows
};

inline __attribute__((always_inline)) Decoded decode(__m256i codes, __m256i table, __m256i transposed,
                                                     const Indices& k) {
  const __m256i next = _mm256_srli_epi16(codes, 4);
  Decoded d;
  d.w[0] = _mm256_shuffle_epi8(table, _mm256_or_si256(_mm256_and_si256(codes, k.low), k.row4));
  d.w[1] = _mm256_shuffle_epi8(transposed, _mm256_or_si256(_mm256_and_si256(codes, k.high), k.row1));
  d.w[2] = _mm256_shuffle_epi8(table, _mm256_or_si256(_mm256_and_si256(next, k.low), k.row4));
  d.w[3] = _mm256_shuffle_epi8(transposed, _mm256_or_si256(_mm256_and_si256(next, k.high), k.row1));
  return d;
}

// What is done once a group: f = fma(D, scale * step, f), and the part of inputs outside 0..15 where there is one.
inline __m256 add_group(__m256 f, __m256i sum, const uint8_t* group, int64_t r, int64_t channels, float step,
                        float rest, int32_t shift) {
  const __m256 factor = _mm256_mul_ps(halves(group + TileLayout::kScales + r * 16), _mm256_set1_ps(step));
  f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(shift))), factor, f);
  if (rest != 0.0f) {
    alignas(32) int32_t levels[8];
    for (int64_t i = 0; i < 8; ++i) levels[i] = level_sum(group, r * 8 + i, channels);
    const __m256i sums = _mm256_load_si256(reinterpret_cast<const __m256i*>(levels));
    f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(factor, _mm256_set1_ps(rest)), f);
  }
  return f;
}

// Outliers, bias and the store of eight rows; only `rows` of them exist.
inline void finish(__m256 f, const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                   int64_t token, int64_t r, const float* bias, float* y, int64_t rows) {
  if (g.outliers) {
    const int8_t* codes = a.outliers + token * g.outlier_width();
    __m256i low = _mm256_setzero_si256(), high = low;  // rows 0-3 and 4-7, two sums each
    for (int64_t channel = 0; channel < g.outlier_width(); channel += 4) {
      const __m256i w = load(tile + layout.outliers_at + channel * 32 + r * 32);
      int four;
      std::memcpy(&four, codes + channel, 4);
      const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(w)), x));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(w, 1)), x));
    }
    // hadd works inside lanes: put the quarters back in order.
    const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    const __m256i total = _mm256_add_epi32(sum, _mm256_set1_epi32(a.outlier_shift[token]));
    const __m256 scale = _mm256_load_ps(reinterpret_cast<const float*>(tile + layout.outlier_scales_at) + r * 8);
    const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(a.outlier_step[token]));
    f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), factor, f);
  }
  if (rows >= 8) {
    if (bias) f = _mm256_add_ps(f, _mm256_loadu_ps(bias));
    _mm256_storeu_ps(y, f);
    return;
  }
  alignas(32) float values[8];
  _mm256_store_ps(values, f);
  for (int64_t i = 0; i < rows; ++i) y[i] = bias ? values[i] + bias[i] : values[i];
}

// Decode: one token, weights go from memory through registers once.
void one_token(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
               const float* bias, float* y, int64_t rows) {
  const Indices k;
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t width = g.width();
  __m256 f[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    const int8_t* x = a.codes + index * width;
    for (int64_t r = 0; r < 4; ++r) {
      const __m256i table = load(group + r * 32), transposed = _mm256_shuffle_epi8(table, k.transpose);
      const uint8_t* codes = group + TileLayout::kCodes + r * 32;
      __m256i sum = _mm256_setzero_si256();
      for (int64_t step = 0; step < width; step += kStep) {
        const Decoded d = decode(load(codes + step * 8), table, transposed, k);
        const __m256i a01 = _mm256_add_epi16(_mm256_maddubs_epi16(d.w[0], broadcast(x + step)),
                                             _mm256_maddubs_epi16(d.w[1], broadcast(x + step + 4)));
        const __m256i a23 = _mm256_add_epi16(_mm256_maddubs_epi16(d.w[2], broadcast(x + step + 8)),
                                             _mm256_maddubs_epi16(d.w[3], broadcast(x + step + 12)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(a01, a23), ones));
      }
      f[r] = add_group(f[r], sum, group, r, g.channels(index), a.step[index], a.rest[index], a.shift[index]);
    }
  }
  for (int64_t r = 0; r < 4 && r * 8 < rows; ++r) {
    finish(f[r], tile, layout, g, a, 0, r, bias ? bias + r * 8 : nullptr, y + r * 8, rows - r * 8);
  }
}

// Sixteen rows and sixteen channels in eight registers, multiplied with every token; sums [token][32] in memory.
inline void multiply_block(const uint8_t* w, const int8_t* x, int64_t width, int64_t tokens, int32_t* sums, bool fresh) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i a0 = load(w), a1 = load(w + 128), a2 = load(w + 256), a3 = load(w + 384);
  const __m256i b0 = load(w + 32), b1 = load(w + 160), b2 = load(w + 288), b3 = load(w + 416);
  for (int64_t token = 0; token < tokens; ++token, x += width, sums += kTileRows) {
    const __m256i x0 = broadcast(x), x1 = broadcast(x + 4), x2 = broadcast(x + 8), x3 = broadcast(x + 12);
    const __m256i a01 = _mm256_add_epi16(_mm256_maddubs_epi16(a0, x0), _mm256_maddubs_epi16(a1, x1));
    const __m256i a23 = _mm256_add_epi16(_mm256_maddubs_epi16(a2, x2), _mm256_maddubs_epi16(a3, x3));
    const __m256i b01 = _mm256_add_epi16(_mm256_maddubs_epi16(b0, x0), _mm256_maddubs_epi16(b1, x1));
    const __m256i b23 = _mm256_add_epi16(_mm256_maddubs_epi16(b2, x2), _mm256_maddubs_epi16(b3, x3));
    __m256i a = _mm256_madd_epi16(_mm256_add_epi16(a01, a23), ones);
    __m256i b = _mm256_madd_epi16(_mm256_add_epi16(b01, b23), ones);
    __m256i* out = reinterpret_cast<__m256i*>(sums);
    if (!fresh) {
      a = _mm256_add_epi32(a, _mm256_load_si256(out));
      b = _mm256_add_epi32(b, _mm256_load_si256(out + 1));
    }
    _mm256_store_si256(out, a);
    _mm256_store_si256(out + 1, b);
  }
}

// Prefill: a group of 32 rows is decoded once into the cache and multiplied with up to kTokenBlock tokens.
void many_tokens(const uint8_t* tile, const TileLayout& layout, const Geometry& g, const Activations& a,
                 const float* bias, float* y, uint8_t* scratch, int64_t first, int64_t tokens, int64_t rows) {
  const Indices k;
  const int64_t width = g.width();
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + kTileRows * width);
  float* f = reinterpret_cast<float*>(sums + kTokenBlock * kTileRows);
  std::memset(f, 0, static_cast<size_t>(tokens) * kTileRows * 4);
  for (int64_t index = 0; index < g.groups(); ++index) {
    const uint8_t* group = tile + index * layout.group_bytes;
    for (int64_t r = 0; r < 4; ++r) {
      const __m256i table = load(group + r * 32), transposed = _mm256_shuffle_epi8(table, k.transpose);
      for (int64_t step = 0; step < width; step += kStep) {
        const Decoded d = decode(load(group + TileLayout::kCodes + step * 8 + r * 32), table, transposed, k);
        uint8_t* out = scratch + step * 32 + r * 32;
        for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * 128), d.w[i]);
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
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t place = token * kTileRows + r * 8;
        const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + place));
        _mm256_store_ps(f + place, add_group(_mm256_load_ps(f + place), sum, group, r, g.channels(index),
                                             a.step[at + token], a.rest[at + token], a.shift[at + token]));
      }
    }
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t r = 0; r < 4 && r * 8 < rows; ++r) {
      finish(_mm256_load_ps(f + token * kTileRows + r * 8), tile, layout, g, a, first + token, r,
             bias ? bias + r * 8 : nullptr, y + (first + token) * g.rows + r * 8, rows - r * 8);
    }
  }
}

}  // namespace

void product_avx2(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
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
