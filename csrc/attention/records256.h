// Records of a quantized cache into AVX2 registers: codes, scales and minima of a chunk of keys or values.
//
// Codes of 4 and 8 bits are read as words of 32. Others do not fill words: a chunk of them is first spread to 8 bits.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../decoder.h"

#define ALWAYS inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace bitwright {

namespace {

// Plane i of a 32-bit word of codes, times 2^(bits * i) except in the last one, where the sign bit would be set.
template <int Bits>
struct Planes {
  static constexpr int kCount = 32 / Bits;
  static constexpr int64_t kBlock = 8 * kCount;  // channels in 32 bytes

  static ALWAYS __m256 get(__m256i words, int i) {
    if (i == kCount - 1) return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 32 - Bits));
    return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(((1 << Bits) - 1) << (Bits * i))));
  }
  // Of a channel in [block][plane][8].
  static ALWAYS int64_t place(int64_t channel) {
    constexpr uint64_t kUnit = kBlock, kPlanes = kCount;  // unsigned: a division is a shift
    const uint64_t c = static_cast<uint64_t>(channel);
    return static_cast<int64_t>(c / kUnit * kUnit + c % kPlanes * 8 + c % kUnit / kPlanes);
  }
  static ALWAYS float factor(int64_t i) {  // a power of two, by its exponent
    const uint32_t bits = (127u - (i == kCount - 1 ? 0u : static_cast<uint32_t>(Bits * i))) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

// Eight words of a record's codes; in the last block only those that the mask has, and 0 beyond.
template <bool Last>
ALWAYS __m256i load_words(const uint8_t* codes, __m256i mask) {
  if (Last) return _mm256_maskload_epi32(reinterpret_cast<const int*>(codes), mask);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

// Scales and minima of a chunk's records, one set for the keys and one for the values.
struct Chunk {
  int64_t first, count;  // keys
  const uint8_t *keys, *values;
  float *key_scale, *key_low, *value_scale, *value_low;  // [kKeyChunk]; 0 after the last
};

void read_parameters(const uint8_t* records, const Records& r, int64_t count, float* scale, float* low) {
  const int64_t bytes = r.bytes();
  const uint8_t* from = records + r.code_bytes();
  for (int64_t t = 0; t < kKeyChunk; t += 4, from += 4 * bytes) {
    int pairs[4] = {};
    if (t + 4 <= count) {
      UNROLL for (int k = 0; k < 4; ++k) std::memcpy(pairs + k, from + k * bytes, 4);
    } else {
      for (int64_t k = 0; t + k < count; ++k) std::memcpy(pairs + k, from + k * bytes, 4);
    }
    const __m256 both = _mm256_cvtph_ps(_mm_setr_epi32(pairs[0], pairs[1], pairs[2], pairs[3]));
    const __m128 a = _mm256_castps256_ps128(both), b = _mm256_extractf128_ps(both, 1);
    _mm_storeu_ps(scale + t, _mm_shuffle_ps(a, b, 0x88));
    _mm_storeu_ps(low + t, _mm_shuffle_ps(a, b, 0xdd));
  }
}

// Records with codes of any width -> with a byte a code, [kKeyChunk][head_dim + 4].
//
// Eight codes fill r.bits bytes, and none is in more than two of them: the two go into 16 bits, a multiplication puts
// the code's lowest bit at bit 8 (there is no shift of 16 bits by as many different counts), and a shift takes it down.
void spread(const uint8_t* from, const Records& r, int64_t count, uint8_t* to) {
  alignas(16) uint8_t places[16];
  alignas(16) uint16_t factors[8];
  for (int i = 0; i < 8; ++i) {
    const int bit = i * r.bits;
    places[2 * i] = static_cast<uint8_t>(bit / 8);
    places[2 * i + 1] = static_cast<uint8_t>(bit / 8 + 1);
    factors[i] = static_cast<uint16_t>(1 << (8 - bit % 8));
  }
  const __m128i pairs = _mm_load_si128(reinterpret_cast<const __m128i*>(places));
  const __m128i up = _mm_load_si128(reinterpret_cast<const __m128i*>(factors));
  const __m128i mask = _mm_set1_epi16(static_cast<int16_t>((1 << r.bits) - 1));
  const int64_t bytes = r.bytes();
  for (int64_t t = 0; t < count; ++t, from += bytes, to += r.head_dim + 4) {
    for (int64_t i = 0, at = 0; i < r.head_dim; i += 8, at += r.bits) {
      uint64_t eight = 0;
      if (bytes - at >= 8) {
        std::memcpy(&eight, from + at, 8);
      } else {
        std::memcpy(&eight, from + at, static_cast<size_t>(bytes - at));
      }
      __m128i codes = _mm_shuffle_epi8(_mm_cvtsi64_si128(static_cast<long long>(eight)), pairs);
      codes = _mm_and_si128(_mm_srli_epi16(_mm_mullo_epi16(codes, up), 8), mask);
      const long long packed = _mm_cvtsi128_si64(_mm_packus_epi16(codes, codes));
      // Of the last ones some lie beyond: the scale, and the next record, are written over them.
      std::memcpy(to + i, &packed, static_cast<size_t>(smaller<int64_t>(8, r.head_dim + 4 - i)));
    }
    std::memcpy(to + r.head_dim, from + r.code_bytes(), 4);
  }
}

}  // namespace

}  // namespace bitwright
