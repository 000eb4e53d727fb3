// Attention over a quantized cache with AVX2 and FMA; softmax with a running maximum, a chunk of keys at a time.
//
// A few rows (decode): codes go from the record through registers into the sums, never to memory. Eight words of 32
// bits are loaded; masking plane i of each leaves code << (bits * i), which converts to fp32 exactly, and the power of
// two is taken off in the query and at the end of the sums. So a code costs an and, a conversion and a multiplication,
// no shift. Scale and minimum are applied to whole dot products: dot(q, code) * scale + sum(q) * minimum.
//
// Many rows (prefill): a chunk is decoded once into panels of 16, keys transposed, and multiplied as matrices.
//
// records256.h reads the records.
#include <immintrin.h>

#include <cstring>

#include "../vector256.h"
#include "records256.h"

namespace bitwright {

namespace {

constexpr int64_t kFewRows = 6;  // up to so many rows decoding again is cheaper than storing what was decoded
constexpr int64_t kTileQueries = 6, kPanel = 16;
constexpr float kMasked = -__builtin_inff();

// Scores of a chunk -> weights exp(score - top), in place; brings top and total up to date and returns what sums so
// far are to be multiplied with. The row sees keys first..last of the chunk.
float weigh(float* scores, int64_t first, int64_t last, float* top, float* total) {
  for (int64_t t = 0; t < first; ++t) scores[t] = kMasked;
  for (int64_t t = last > 0 ? last : 0; t < kKeyChunk; ++t) scores[t] = kMasked;
  __m256 highs = _mm256_loadu_ps(scores);
  for (int64_t t = 8; t < kKeyChunk; t += 8) highs = _mm256_max_ps(highs, _mm256_loadu_ps(scores + t));
  const float high = reduce_max(highs), old = *top;
  float factor = 1.0f;
  if (!(high <= old)) {
    *top = high;
    factor = _mm256_cvtss_f32(exponentials(_mm256_set1_ps(old - high)));
  }
  // Nothing seen yet: any finite number makes all weights exp(-inf) = 0.
  const __m256 tops = _mm256_set1_ps(*top == kMasked ? 0.0f : *top);
  __m256 sum = _mm256_setzero_ps();
  for (int64_t t = 0; t < kKeyChunk; t += 8) {
    const __m256 p = exponentials(_mm256_sub_ps(_mm256_loadu_ps(scores + t), tops));
    _mm256_storeu_ps(scores + t, p);
    sum = _mm256_add_ps(sum, p);
  }
  *total = *total * factor + reduce_add(sum);
  return factor;
}

// --- a few rows ---

// Queries in the order in which planes come out of words: [block][plane][8], with the powers of two.
template <int Bits>
float plane_query(const float* q, int64_t dim, int64_t width, float scale, float* out) {
  using P = Planes<Bits>;
  std::memset(out, 0, static_cast<size_t>(width) * 4);
  float all[8] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const float value = q[d] * scale;
    all[d % 8] += value;
    out[P::place(d)] = value * P::factor(d % P::kCount);
  }
  return reduce_add(_mm256_loadu_ps(all));
}

template <int Bits, bool Last>
ALWAYS void score_block(const uint8_t* codes, int64_t bytes, __m256i mask, const float* q, __m256 (&even)[4],
                        __m256 (&odd)[4]) {
  using P = Planes<Bits>;
  __m256i w[4];
  UNROLL for (int k = 0; k < 4; ++k) w[k] = load_words<Last>(codes + k * bytes, mask);
  UNROLL for (int i = 0; i < P::kCount; i += 2) {
    const __m256 q0 = _mm256_loadu_ps(q + i * 8), q1 = _mm256_loadu_ps(q + i * 8 + 8);
    UNROLL for (int k = 0; k < 4; ++k) even[k] = _mm256_fmadd_ps(P::get(w[k], i), q0, even[k]);
    UNROLL for (int k = 0; k < 4; ++k) odd[k] = _mm256_fmadd_ps(P::get(w[k], i + 1), q1, odd[k]);
  }
}

template <int Bits>
ALWAYS void scores_of_four(const uint8_t* codes, int64_t bytes, int64_t words, const float* q, float* out) {
  __m256 even[4], odd[4];  // two sums each: one would wait for its own last multiplication
  UNROLL for (int k = 0; k < 4; ++k) even[k] = odd[k] = _mm256_setzero_ps();
  const __m256i mask = lanes(words % 8);
  for (int64_t left = words; left >= 8; left -= 8, codes += 32, q += Planes<Bits>::kBlock) {
    score_block<Bits, false>(codes, bytes, mask, q, even, odd);
  }
  if (words % 8) score_block<Bits, true>(codes, bytes, mask, q, even, odd);
  UNROLL for (int k = 0; k < 4; ++k) even[k] = _mm256_add_ps(even[k], odd[k]);
  const __m256 sum = _mm256_hadd_ps(_mm256_hadd_ps(even[0], even[1]), _mm256_hadd_ps(even[2], even[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
}

template <int Bits>
void few_scores(const Chunk& c, const Records& r, int64_t words, const float* q, float all, float* scores) {
  const int64_t bytes = r.bytes();
  int64_t t = 0;
  for (; t + 4 <= c.count; t += 4) scores_of_four<Bits>(c.keys + t * bytes, bytes, words, q, scores + t);
  for (; t < c.count; ++t) {  // the same key four times, one kept
    float four[4];
    scores_of_four<Bits>(c.keys + t * bytes, 0, words, q, four);
    scores[t] = four[0];
  }
  const __m256 alls = _mm256_set1_ps(all);
  for (t = 0; t < c.count; t += 8) {
    const __m256 low = _mm256_mul_ps(alls, _mm256_loadu_ps(c.key_low + t));
    _mm256_storeu_ps(scores + t,
                     _mm256_fmadd_ps(_mm256_loadu_ps(scores + t), _mm256_loadu_ps(c.key_scale + t), low));
  }
}

template <int Bits, bool Last>
ALWAYS void value_block(const uint8_t* codes, int64_t bytes, int64_t count, __m256i mask, const float* weights,
                        __m256 factor, float* sums) {
  using P = Planes<Bits>;
  __m256 sum[P::kCount];
  UNROLL for (int i = 0; i < P::kCount; ++i) sum[i] = _mm256_mul_ps(_mm256_loadu_ps(sums + i * 8), factor);
  for (int64_t t = 0; t < count; ++t, codes += bytes) {
    const __m256i w = load_words<Last>(codes, mask);
    const __m256 p = _mm256_broadcast_ss(weights + t);
    UNROLL for (int i = 0; i < P::kCount; ++i) sum[i] = _mm256_fmadd_ps(P::get(w, i), p, sum[i]);
  }
  UNROLL for (int i = 0; i < P::kCount; ++i) _mm256_storeu_ps(sums + i * 8, sum[i]);
}

// sums [block][plane][8] = factor * sums + weight * value; the minima in `base`, the same for all channels.
template <int Bits>
void few_values(const Chunk& c, const Records& r, int64_t words, float* weights, float factor, float* sums,
                float* base) {
  __m256 low = _mm256_setzero_ps();
  for (int64_t t = 0; t < c.count; t += 8) {
    const __m256 p = _mm256_loadu_ps(weights + t);
    low = _mm256_fmadd_ps(p, _mm256_loadu_ps(c.value_low + t), low);
    _mm256_storeu_ps(weights + t, _mm256_mul_ps(p, _mm256_loadu_ps(c.value_scale + t)));
  }
  *base = *base * factor + reduce_add(low);
  const __m256 factors = _mm256_set1_ps(factor);
  const __m256i mask = lanes(words % 8);
  const uint8_t* codes = c.values;
  for (int64_t left = words; left >= 8; left -= 8, codes += 32, sums += Planes<Bits>::kBlock) {
    value_block<Bits, false>(codes, r.bytes(), c.count, mask, weights, factors, sums);
  }
  if (words % 8) value_block<Bits, true>(codes, r.bytes(), c.count, mask, weights, factors, sums);
}

// --- many rows ---

// Keys as [panel of 16 keys][channel][16].
template <int Bits>
void decode_keys(const Chunk& c, const Records& r, int64_t words, float* out) {
  constexpr int64_t kCount = Planes<Bits>::kCount;
  const int64_t width = words * kCount;
  const __m256i mask = _mm256_set1_epi32((1 << Bits) - 1), last = _mm256_set1_epi32(static_cast<int>(c.count - 1));
  for (int64_t t = 0; t < c.count; t += 8) {
    float* to = out + t / kPanel * width * kPanel + t % kPanel;
    const __m256i keys =
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(t)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i places =
        _mm256_mullo_epi32(_mm256_min_epi32(keys, last), _mm256_set1_epi32(static_cast<int>(r.bytes())));
    const __m256 scale = _mm256_loadu_ps(c.key_scale + t), low = _mm256_loadu_ps(c.key_low + t);
    for (int64_t j = 0; j < words; ++j) {
      __m256i w = _mm256_i32gather_epi32(reinterpret_cast<const int*>(c.keys + j * 4), places, 1);
      UNROLL for (int64_t i = 0; i < kCount; ++i) {
        const __m256 code = _mm256_cvtepi32_ps(_mm256_and_si256(w, mask));
        _mm256_storeu_ps(to + (j * kCount + i) * kPanel, _mm256_fmadd_ps(code, scale, low));
        w = _mm256_srli_epi32(w, Bits);
      }
    }
  }
}

// Values as [panel of 16 channels][key][16].
template <int Bits>
void decode_values(const Chunk& c, const Records& r, float* out) {
  const int64_t code_bytes = r.code_bytes();
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  for (int64_t t = 0; t < c.count; ++t) {
    const uint8_t* codes = c.values + t * r.bytes();
    const __m256 scale = _mm256_broadcast_ss(c.value_scale + t), low = _mm256_broadcast_ss(c.value_low + t);
    for (int64_t at = 0, channel = 0; at < code_bytes; at += Bits, channel += 8) {
      __m256i code;
      if (Bits == 4) {
        int word;
        std::memcpy(&word, codes + at, 4);
        code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32(15));
      } else {
        uint64_t eight = 0;
        std::memcpy(&eight, codes + at, static_cast<size_t>(smaller<int64_t>(8, code_bytes - at)));
        code = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(eight)));
      }
      _mm256_storeu_ps(out + channel / kPanel * kKeyChunk * kPanel + t * kPanel + channel % kPanel,
                       _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, low));
    }
  }
}

// out [6][16] (rows `out_stride` floats apart) = factor * out + a [6][depth] b [depth][16]; factor null: 0.
ALWAYS void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, const float* factor, float* out,
                     int64_t out_stride) {
  __m256 sum[kTileQueries][2];
  UNROLL for (int i = 0; i < kTileQueries; ++i) {
    sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    if (factor) {
      const __m256 f = _mm256_broadcast_ss(factor + i);
      sum[i][0] = _mm256_mul_ps(_mm256_loadu_ps(out + i * out_stride), f);
      sum[i][1] = _mm256_mul_ps(_mm256_loadu_ps(out + i * out_stride + 8), f);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    const __m256 b0 = _mm256_loadu_ps(b + d * kPanel), b1 = _mm256_loadu_ps(b + d * kPanel + 8);
    UNROLL for (int i = 0; i < kTileQueries; ++i) {
      const __m256 x = _mm256_broadcast_ss(a + i * a_stride + d);
      sum[i][0] = _mm256_fmadd_ps(x, b0, sum[i][0]);
      sum[i][1] = _mm256_fmadd_ps(x, b1, sum[i][1]);
    }
  }
  UNROLL for (int i = 0; i < kTileQueries; ++i) {
    _mm256_storeu_ps(out + i * out_stride, sum[i][0]);
    _mm256_storeu_ps(out + i * out_stride + 8, sum[i][1]);
  }
}

template <int Bits>
void attend(const Attention& a, const Span& s, float* scratch, const Partial& out) {
  using P = Planes<Bits>;
  const bool spreads = a.cache.bits != Bits;
  const Records r{a.cache.heads, a.cache.capacity, a.cache.head_dim, Bits};
  const int64_t dim = r.head_dim, words = (r.code_bytes() + 3) / 4, blocks = (words + 7) / 8;
  const bool few = s.rows <= kFewRows;
  const int64_t tiles = (s.rows + kTileQueries - 1) / kTileQueries;
  // Few: widths of whole blocks. Many: keys padded to whole words, values to whole panels.
  const int64_t q_width = few ? blocks * P::kBlock : words * P::kCount;
  const int64_t sum_width = few ? q_width : round_up(dim, kPanel);
  const int64_t rows = few ? s.rows : tiles * kTileQueries;
  const auto take = [&scratch](int64_t floats) {
    float* place = scratch;
    scratch += floats;
    return place;
  };
  float *q = take(rows * q_width), *sums = take(rows * sum_width), *scores = take(rows * kKeyChunk);
  float *keys = few ? nullptr : take(kKeyChunk * q_width), *values = few ? nullptr : take(kKeyChunk * sum_width);
  Chunk c;
  c.key_scale = take(kKeyChunk), c.key_low = take(kKeyChunk);
  c.value_scale = take(kKeyChunk), c.value_low = take(kKeyChunk);
  // The codes of both, and room for reading them in whole words.
  const int64_t stored = a.cache.bytes(), chunk_floats = spreads ? kKeyChunk * r.bytes() / 4 + 8 : 0;
  uint8_t* spread_keys = reinterpret_cast<uint8_t*>(take(chunk_floats));
  uint8_t* spread_values = reinterpret_cast<uint8_t*>(take(chunk_floats));
  float all[kFewRows], base[kFewRows], factors[kRowBlock];
  std::memset(sums, 0, static_cast<size_t>(rows * sum_width) * 4);
  for (int64_t i = 0; i < rows; ++i) {
    if (few) {
      all[i] = plane_query<Bits>(a.query(s.head, s.first_row + i), dim, q_width, a.scale, q + i * q_width);
      base[i] = 0.0f;
    } else {
      const float* from = i < s.rows ? a.query(s.head, s.first_row + i) : nullptr;
      for (int64_t d = 0; d < q_width; ++d) q[i * q_width + d] = from && d < dim ? from[d] * a.scale : 0.0f;
    }
    factors[i] = 0.0f;
    if (i >= s.rows) continue;
    out.top[i] = kMasked;
    out.total[i] = 0.0f;
  }
  for (c.first = s.first_key; c.first < s.last_key; c.first += kKeyChunk) {
    c.count = smaller(kKeyChunk, s.last_key - c.first);
    c.keys = a.keys + (s.head * r.capacity + c.first) * stored;
    c.values = a.values + (s.head * r.capacity + c.first) * stored;
    if (spreads) {
      spread(c.keys, a.cache, c.count, spread_keys);
      spread(c.values, a.cache, c.count, spread_values);
      c.keys = spread_keys;
      c.values = spread_values;
    }
    read_parameters(c.keys, r, c.count, c.key_scale, c.key_low);
    read_parameters(c.values, r, c.count, c.value_scale, c.value_low);
    if (!few) {
      decode_keys<Bits>(c, r, words, keys);
      decode_values<Bits>(c, r, values);
      for (int64_t panel = 0; panel * kPanel < c.count; ++panel) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          multiply(q + tile * kTileQueries * q_width, q_width, keys + panel * kPanel * q_width, q_width, nullptr,
                   scores + tile * kTileQueries * kKeyChunk + panel * kPanel, kKeyChunk);
        }
      }
    }
    for (int64_t i = 0; i < s.rows; ++i) {
      float* row = scores + i * kKeyChunk;
      const int64_t first = a.first_key(s.first_row + i) - c.first;
      const int64_t last = smaller(a.end_key(s.first_row + i) - c.first, c.count);
      if (few) few_scores<Bits>(c, r, words, q + i * q_width, all[i], row);
      factors[i] = weigh(row, smaller(first, kKeyChunk), last, out.top + i, out.total + i);
      if (few) few_values<Bits>(c, r, words, row, factors[i], sums + i * sum_width, base + i);
    }
    for (int64_t panel = 0; !few && panel * kPanel < sum_width; ++panel) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        multiply(scores + tile * kTileQueries * kKeyChunk, kKeyChunk, values + panel * kPanel * kKeyChunk, c.count,
                 factors + tile * kTileQueries, sums + tile * kTileQueries * sum_width + panel * kPanel, sum_width);
      }
    }
  }
  for (int64_t i = 0; i < s.rows; ++i) {
    const float* from = sums + i * sum_width;
    float* to = out.sums + i * dim;
    if (!few) {
      std::memcpy(to, from, static_cast<size_t>(dim) * 4);
      continue;
    }
    for (int64_t d = 0; d < dim; ++d) to[d] = from[P::place(d)] * P::factor(d % P::kCount) + base[i];
  }
}

}  // namespace

void attend_avx2(const Attention& a, const Span& s, float* scratch, const Partial& out) {
  if (a.cache.bits == 4) {
    attend<4>(a, s, scratch, out);
  } else {
    attend<8>(a, s, scratch, out);
  }
}

}  // namespace bitwright
