// Codes of a tile into bytes with AVX-512: as decode256.h, with four slots to a vector.
//
// avx512_emulated.cpp takes this with SIMDe in place of the processor's own vectors.
#pragma once
#ifdef BITWRIGHT_EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/dpwssd.h>
#include <simde/x86/f16c.h>
#else
#include <immintrin.h>
#endif

#include "kernels.h"

#ifdef BITWRIGHT_EMULATED  // every instruction is a page of code there: one copy of it, not hundreds
#define ALWAYS __attribute__((noinline))
#define UNROLL
#define UNROLL_TWO
#else
#define ALWAYS inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_TWO _Pragma("GCC unroll 2")  // where the count may be any: less code, and compiled in seconds
#endif

namespace bitwright {

namespace {  // decode256.h has types of the same names

ALWAYS __m512i load(const uint8_t* p) { return _mm512_loadu_si512(reinterpret_cast<const void*>(p)); }

ALWAYS void store(uint8_t* p, __m512i v) { _mm512_storeu_si512(reinterpret_cast<void*>(p), v); }

ALWAYS __m512i spread(int a, int b, int c, int d) {  // four bytes a lane
  return _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
}

// A 16-byte pattern in all four lanes.
ALWAYS __m512i lanes(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// As in decode256.h: a lane holds one slot's codes; of two bits there is a table for the lower code of a nibble, and one
// for the upper.
struct Decoder {
  __m512i nibble = _mm512_set1_epi8(15);
  __m512i lower = spread(0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c);
  __m512i upper = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909,
                                   0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202,
                                   0x01010101, 0x00000000);
};

template <typename Form>
struct Tables {
  ALWAYS Tables(const uint8_t*, const Decoder&) {}
};

template <>
struct Tables<Pairs> {
  __m512i lower, upper;

  ALWAYS Tables(const uint8_t* levels, const Decoder& d) {  // of four slots
    const __m512i all = lanes(levels);
    lower = _mm512_shuffle_epi8(all, d.lower);
    upper = _mm512_shuffle_epi8(all, d.upper);
  }
};

template <>
struct Tables<Form<4, true>> {
  __m512i sixteen;

  ALWAYS Tables(const uint8_t* levels, const Decoder&) : sixteen(load(levels)) {}
};

template <typename Form>
struct Weights {
  __m512i w[4];  // channels 0-15, 16-31, 32-47, 48-63 of four slots

  ALWAYS Weights(const uint8_t* codes, const Tables<Form>& t, const Decoder& d) {
    if constexpr (Form::kBits == 8) {
      UNROLL for (int i = 0; i < 4; ++i) w[i] = load(codes + i * 64);
    } else {
      UNROLL for (int i = 0; i < Form::kLines; ++i) {
        const __m512i line = load(codes + i * 64);
        const __m512i low = _mm512_and_si512(line, d.nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(line, 4), d.nibble);
        if constexpr (Form::kBits == 2) {
          w[0] = _mm512_shuffle_epi8(t.lower, low);
          w[1] = _mm512_shuffle_epi8(t.upper, low);
          w[2] = _mm512_shuffle_epi8(t.lower, high);
          w[3] = _mm512_shuffle_epi8(t.upper, high);
        } else if constexpr (Form::kTable) {
          w[i * 2] = _mm512_shuffle_epi8(t.sixteen, low);
          w[i * 2 + 1] = _mm512_shuffle_epi8(t.sixteen, high);
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
