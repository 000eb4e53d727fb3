// The encoder of cache records, eight channels at a time; divides and rounds exactly as the scalar one does.
#include "../vector256.h"
#include "kernels.h"

namespace bitwright {

namespace {

// Eight codes, a byte each, without the gaps between them: the lowest `bits` bytes count.
inline uint64_t close_ranks(const uint8_t* codes, int bits) {
  uint64_t packed = 0;
  for (int k = 0; k < 8; ++k) packed |= static_cast<uint64_t>(codes[k]) << (k * bits);
  return packed;
}

// Eight values, clamped to fp16; 0 in lanes beyond the last.
inline __m256 load(const float* states, int64_t i, int64_t count) {
  const __m256 v = i + 8 <= count ? _mm256_loadu_ps(states + i) : _mm256_maskload_ps(states + i, lanes(count - i));
  return _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(kLargestHalf)), _mm256_set1_ps(-kLargestHalf));
}

}  // namespace

void append_avx2(const float* states, int64_t stride, int64_t tokens, const Records& r, float cut,
                 uint8_t* records) {
  const int64_t count = r.head_dim, code_bytes = r.code_bytes();
  const float top = static_cast<float>((1 << r.bits) - 1);
  const __m256 tops = _mm256_set1_ps(top), zeros = _mm256_setzero_ps();
  const __m256 first = _mm256_set1_ps(kLargestHalf);
  for (int64_t token = 0; token < tokens; ++token, states += stride, records += r.bytes()) {
    __m256 lows = first, negated = first;  // the maximum as minimum of the negatives
    __m256 odd = zeros;
    for (int64_t i = 0; i < count; i += 8) {
      __m256 v = load(states, i, count), minus = _mm256_sub_ps(zeros, v);
      if (i + 8 > count) {
        const __m256 mask = _mm256_castsi256_ps(lanes(count - i));
        const __m256 raw = _mm256_maskload_ps(states + i, lanes(count - i));
        odd = _mm256_or_ps(odd, _mm256_cmp_ps(raw, raw, _CMP_UNORD_Q));
        v = _mm256_blendv_ps(first, v, mask);
        minus = _mm256_blendv_ps(first, minus, mask);
      } else {
        const __m256 raw = _mm256_loadu_ps(states + i);
        odd = _mm256_or_ps(odd, _mm256_cmp_ps(raw, raw, _CMP_UNORD_Q));
      }
      lows = _mm256_min_ps(lows, v);
      negated = _mm256_min_ps(negated, minus);
    }
    const bool number = _mm256_testz_ps(odd, odd);
    const Parameters p = parameters(reduce_min(lows), -reduce_min(negated), top, cut, number);
    const __m256 low = _mm256_set1_ps(p.low), scale = _mm256_set1_ps(p.scale);
    const __m128i keep = _mm_set1_epi32(number ? -1 : 0);
    for (int64_t i = 0; i < count; i += 16) {
      __m256i codes[2];
      for (int64_t half = 0; half < 2; ++half) {
        codes[half] = _mm256_setzero_si256();
        const int64_t at = i + half * 8;
        if (at >= count) continue;
        __m256 c = _mm256_div_ps(_mm256_sub_ps(load(states, at, count), low), scale);
        c = _mm256_round_ps(c, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        c = _mm256_min_ps(_mm256_max_ps(c, zeros), tops);
        codes[half] = _mm256_and_si256(_mm256_cvtps_epi32(c), lanes(count - at));
      }
      // Packing works inside 128-bit lanes: put the quarters back in order.
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(codes[0], codes[1]), 0xd8);
      __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      bytes = _mm_and_si128(bytes, keep);
      int64_t place = i, size = 16;
      if (r.bits == 4) {  // low + 16 * high in each pair
        bytes = _mm_packus_epi16(_mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001)), _mm_setzero_si128());
        place = i / 2;
        size = 8;
      }
      alignas(16) uint8_t memory[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(memory), bytes);
      if (r.bits != 8 && r.bits != 4) {
        for (int64_t half = 0; half < 2; ++half) {
          const uint64_t packed = close_ranks(memory + half * 8, r.bits);
          const int64_t at = (i / 8 + half) * r.bits;
          const int64_t size = smaller<int64_t>(r.bits, code_bytes - at);
          if (size > 0) std::memcpy(records + at, &packed, static_cast<size_t>(size));
        }
        continue;
      }
      const int64_t left = code_bytes - place;
      if (left >= 16 && size == 16) {
        std::memcpy(records + place, memory, 16);
      } else if (left >= 8 && size == 8) {
        std::memcpy(records + place, memory, 8);
      } else {
        for (int64_t k = 0; k < size && k < left; ++k) records[place + k] = memory[k];
      }
    }
    std::memcpy(records + code_bytes, p.halves, 4);
  }
}

}  // namespace bitwright
