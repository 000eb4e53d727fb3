// The boolean product with AVX-512: vpopcntb (BITALG) counts in 64 bytes at a time.
//
// avx512_emulated.cpp builds this file with SIMDe, so that its arithmetic is tested on machines without AVX-512.
#ifdef BITWRIGHT_EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/popcnt.h>
#include <simde/x86/f16c.h>
#define planes_avx512 planes_avx512_emulated
#else
#include <immintrin.h>
#endif

#include "rows256.h"

namespace bitwright {

namespace {

BITWRIGHT_INLINE __m512i load64(const void* p) { return _mm512_loadu_si512(p); }

BITWRIGHT_INLINE __m512i add_count(__m512i sum, __m512i weights, __m512i bits) {
  return _mm512_add_epi8(sum, _mm512_popcnt_epi8(_mm512_and_si512(weights, bits)));
}

// The words of a part as bytes of eight channels, one a line and plane.
struct Bytes {
  alignas(64) uint8_t of[2][kPartLines * 4];  // planes 0 and 2, planes 1 and 3; [line][plane / 2], two bytes unused

  BITWRIGHT_INLINE Bytes(const uint16_t* words, int64_t lines) {
    std::memset(of[0], 0, sizeof(of[0]));
    std::memcpy(of[0], words, static_cast<size_t>(lines * 4));
    const __m512i w = load64(of[0]), nibbles = _mm512_set1_epi8(15);
    const __m512i even = _mm512_and_si512(w, nibbles);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibbles);
    // A word of 32 bits holds the nibbles of channels 0-3 in its lower half, of 4-7 in its upper.
    _mm512_storeu_si512(of[0], _mm512_or_si512(even, _mm512_srli_epi32(even, 12)));
    _mm512_storeu_si512(of[1], _mm512_or_si512(odd, _mm512_srli_epi32(odd, 12)));
  }

  BITWRIGHT_INLINE __m512i everywhere(int64_t line, int plane) const {
    return _mm512_set1_epi8(static_cast<char>(of[plane % 2][line * 4 + plane / 2]));
  }
};

// A line of 64 bytes is q and m of 32 rows: one count for both. Prepared: q AND m, 32 bytes a line, two lines a count.
struct Counter {
  static constexpr int64_t kPreparedBytes = 32;

  BITWRIGHT_INLINE static void prepare(const uint8_t* codes, int64_t lines, uint8_t* prepared) {
    for (int64_t line = 0; line < lines; ++line) {
      const __m256i both = _mm256_and_si256(load_line(codes + line * 64), load_line(codes + line * 64 + 32));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + line * kPreparedBytes), both);
    }
  }

  BITWRIGHT_INLINE static void count(const uint8_t* codes, const uint8_t* prepared, int64_t lines,
                                     const uint16_t* words, Counts counts[kPlanes]) {
    const Bytes bytes(words, lines);
    __m512i apart[kPlanes], both[kPlanes];
    for (int plane = 0; plane < kPlanes; ++plane) apart[plane] = both[plane] = _mm512_setzero_si512();
    int64_t line = 0;
    for (; line + 2 <= lines; line += 2) {
      const __m512i w0 = load64(codes + line * 64), w1 = load64(codes + line * 64 + 64);
      const __m512i w = load64(prepared + line * kPreparedBytes);
      for (int plane = 0; plane < kPlanes; ++plane) {
        const __m512i b0 = bytes.everywhere(line, plane), b1 = bytes.everywhere(line + 1, plane);
        apart[plane] = add_count(add_count(apart[plane], w0, b0), w1, b1);
        both[plane] = add_count(both[plane], w, _mm512_mask_mov_epi64(b0, 0xf0, b1));
      }
    }
    if (line < lines) {
      const __m512i w0 = load64(codes + line * 64);
      const __m512i w = _mm512_inserti64x4(_mm512_setzero_si512(), load_line(prepared + line * kPreparedBytes), 0);
      for (int plane = 0; plane < kPlanes; ++plane) {
        const __m512i b = bytes.everywhere(line, plane);
        apart[plane] = add_count(apart[plane], w0, b);
        both[plane] = add_count(both[plane], w, b);
      }
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      counts[plane] = {lower(apart[plane]), upper(apart[plane]),
                       _mm256_add_epi8(lower(both[plane]), upper(both[plane]))};
    }
  }

  BITWRIGHT_INLINE static __m256i lower(__m512i v) { return _mm512_castsi512_si256(v); }
  BITWRIGHT_INLINE static __m256i upper(__m512i v) { return _mm512_extracti64x4_epi64(v, 1); }
};

}  // namespace

void planes_avx512(const uint8_t* weights, const Geometry& g, const PlaneActivations& a, const float* bias, float* y,
                   uint8_t* scratch, int64_t first, int64_t last) {
  multiply_tiles<Counter>(weights, g, a, bias, y, scratch, first, last);
}

}  // namespace bitwright
