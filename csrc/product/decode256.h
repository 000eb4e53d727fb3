// Codes of a tile into bytes with AVX2: what differs between the forms of stored weights.
//
// A vector holds codes of two slots, one in each lane. Decoding 64 channels gives four vectors of unsigned bytes: levels
// with 128 added, or the codes themselves where a zero point takes the place of a table.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#define ALWAYS inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")
#define UNROLL_TWO _Pragma("GCC unroll 2")  // where the count may be any: less code, and compiled in seconds

namespace bitwright {

namespace {  // decode512.h has types of the same names

ALWAYS __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

ALWAYS void store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

// Constants that the compiler keeps in registers over all groups.
struct Decoder {
  __m256i nibble = _mm256_set1_epi8(15);
  __m256i lower = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,  //
                                   4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  __m256i upper = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                   4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
};

// What one group's codes of two slots stand for, `levels` those of the first of the two.
template <typename Form>
struct Tables {
  ALWAYS Tables(const uint8_t*, const Decoder&) {}
};

// Two bits: a nibble holds two codes, so a table of sixteen bytes says the level of either: one table for the lower
// code, one for the upper, and no shift between them.
template <>
struct Tables<Pairs> {
  __m256i lower, upper;

  ALWAYS Tables(const uint8_t* levels, const Decoder& d) {
    int64_t eight;
    std::memcpy(&eight, levels, 8);
    const __m256i both = _mm256_set1_epi64x(eight);
    lower = _mm256_shuffle_epi8(both, d.lower);
    upper = _mm256_shuffle_epi8(both, d.upper);
  }
};

template <>
struct Tables<Form<4, true>> {
  __m256i sixteen;

  ALWAYS Tables(const uint8_t* levels, const Decoder&) : sixteen(load(levels)) {}
};

template <typename Form>
struct Weights {
  __m256i w[4];  // channels 0-15, 16-31, 32-47, 48-63 of two slots

  ALWAYS Weights(const uint8_t* codes, const Tables<Form>& t, const Decoder& d) {
    if constexpr (Form::kBits == 8) {
      UNROLL for (int i = 0; i < 4; ++i) w[i] = load(codes + i * 64);
    } else {
      UNROLL for (int i = 0; i < Form::kLines; ++i) {
        const __m256i line = load(codes + i * 64);
        const __m256i low = _mm256_and_si256(line, d.nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), d.nibble);
        if constexpr (Form::kBits == 2) {
          w[0] = _mm256_shuffle_epi8(t.lower, low);
          w[1] = _mm256_shuffle_epi8(t.upper, low);
          w[2] = _mm256_shuffle_epi8(t.lower, high);
          w[3] = _mm256_shuffle_epi8(t.upper, high);
        } else if constexpr (Form::kTable) {
          w[i * 2] = _mm256_shuffle_epi8(t.sixteen, low);
          w[i * 2 + 1] = _mm256_shuffle_epi8(t.sixteen, high);
        } else {
          w[i * 2] = low;
          w[i * 2 + 1] = high;
        }
      }
    }
  }
};

}  // namespace

}  // namespace bitwright
