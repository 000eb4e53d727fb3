// The boolean product with AVX2: counts by byte shuffle.
//
// AVX2 has no population count. The usual one looks up the nibbles of w AND b in a table of sixteen counts: two masks, a
// shift, two shuffles and two additions for each of 12 products. Here 32 rows stand side by side and share the input,
// so its bits choose the table instead: entry w of table b is popcount(w AND b). The AND is gone, and because a count of
// four channels needs three bits, one table serves two planes: the count of the lower plane plus 16 times that of the
// upper one. All 256 tables of 16 bytes lie in the cache of the first level.
#include <immintrin.h>

#include "rows256.h"

namespace bitwright {

namespace {

// At compile time: a constructor that runs when the module is loaded would meet processors without AVX2.
struct Tables {
  alignas(64) uint8_t entry[256][16] = {};

  constexpr Tables() {
    for (int b = 0; b < 256; ++b) {
      for (int w = 0; w < 16; ++w) {
        entry[b][w] = static_cast<uint8_t>(__builtin_popcount(w & b & 15) + 16 * __builtin_popcount(w & (b >> 4)));
      }
    }
  }
};

constexpr Tables tables;

BITWRIGHT_INLINE __m256i table(unsigned b) {
  return _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(tables.entry[b]));
}

// Sums of the counts of two planes, q, m and both: `lower` exact bytes; `upper` as `split` leaves them.
struct Pair {
  __m256i lower[3], upper[3];
};

// Sums of up to three counts are below 16: cut them in two. The shift is one of 16 bits, so the even bytes of `upper`
// get 16 times the lower count of their odd neighbour, modulo 256; `upper_counts` takes that off.
BITWRIGHT_INLINE void split(__m256i sum, int base, Pair& pair) {
  pair.lower[base] = _mm256_add_epi8(pair.lower[base], _mm256_and_si256(sum, _mm256_set1_epi8(15)));
  pair.upper[base] = _mm256_add_epi8(pair.upper[base], _mm256_srli_epi16(sum, 4));
}

BITWRIGHT_INLINE __m256i upper_counts(const Pair& pair, int base) {
  const __m256i neighbour = _mm256_and_si256(_mm256_srli_epi16(pair.lower[base], 4), _mm256_set1_epi16(0xf0));
  return _mm256_sub_epi8(pair.upper[base], neighbour);
}

// Prepared: for every four channels their nibbles of q, of m and of q AND m, 32 bytes each.
struct Counter {
  static constexpr int64_t kNibbleBytes = 96, kPreparedBytes = 2 * kNibbleBytes;

  BITWRIGHT_INLINE static void prepare(const uint8_t* codes, int64_t lines, uint8_t* prepared) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int64_t line = 0; line < lines; ++line, codes += 64, prepared += kPreparedBytes) {
      const __m256i q = load_line(codes), m = load_line(codes + 32), both = _mm256_and_si256(q, m);
      const __m256i parts[3] = {q, m, both};
      __m256i* out = reinterpret_cast<__m256i*>(prepared);
      for (int base = 0; base < 3; ++base) {
        _mm256_storeu_si256(out + base, _mm256_and_si256(parts[base], nibble));
        _mm256_storeu_si256(out + 3 + base, _mm256_and_si256(_mm256_srli_epi16(parts[base], 4), nibble));
      }
    }
  }

  BITWRIGHT_INLINE static void count(const uint8_t* codes, const uint8_t* prepared, int64_t lines,
                                     const uint16_t* words, Counts counts[kPlanes]) {
    (void)codes;
    for (int half = 0; half < 2; ++half) {  // planes 0 and 1 are the low byte of a word, 2 and 3 the high one
      const Pair pair = count_pair(prepared, lines, reinterpret_cast<const uint8_t*>(words) + half);
      counts[2 * half] = {pair.lower[0], pair.lower[1], pair.lower[2]};
      counts[2 * half + 1] = {upper_counts(pair, 0), upper_counts(pair, 1), upper_counts(pair, 2)};
    }
  }

  BITWRIGHT_INLINE static Pair count_pair(const uint8_t* prepared, int64_t lines, const uint8_t* bits) {
    Pair pair;
    for (int base = 0; base < 3; ++base) pair.lower[base] = pair.upper[base] = _mm256_setzero_si256();
    int64_t left = 2 * lines;
    for (; left >= 3; left -= 3, prepared += 3 * kNibbleBytes, bits += 6) {
      const __m256i t0 = table(bits[0]), t1 = table(bits[2]), t2 = table(bits[4]);
      for (int base = 0; base < 3; ++base) {
        const uint8_t* w = prepared + base * 32;
        const __m256i sum = _mm256_add_epi8(_mm256_shuffle_epi8(t0, load_line(w)),
                                            _mm256_shuffle_epi8(t1, load_line(w + kNibbleBytes)));
        split(_mm256_add_epi8(sum, _mm256_shuffle_epi8(t2, load_line(w + 2 * kNibbleBytes))), base, pair);
      }
    }
    for (; left > 0; --left, prepared += kNibbleBytes, bits += 2) {
      const __m256i t = table(bits[0]);
      for (int base = 0; base < 3; ++base) split(_mm256_shuffle_epi8(t, load_line(prepared + base * 32)), base, pair);
    }
    return pair;
  }
};

}  // namespace

void planes_avx2(const uint8_t* weights, const Geometry& g, const PlaneActivations& a, const float* bias, float* y,
                 uint8_t* scratch, int64_t first, int64_t last) {
  multiply_tiles<Counter>(weights, g, a, bias, y, scratch, first, last);
}

}  // namespace bitwright
