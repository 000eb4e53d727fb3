// Attention over a quantized cache, one value at a time: the oracle of the others.
#include <cmath>
#include <cstring>

#include "../decoder.h"

namespace bitwright {

namespace {

struct Record {
  const uint8_t* codes;
  int bits;
  float scale, low;

  Record(const Records& r, const uint8_t* records, int64_t head, int64_t token)
      : codes(records + (head * r.capacity + token) * r.bytes()), bits(r.bits) {
    uint16_t halves[2];
    std::memcpy(halves, codes + r.code_bytes(), 4);
    scale = half_to_float(halves[0]);
    low = half_to_float(halves[1]);
  }
  float code(int64_t i) const {
    const int64_t bit = i * bits;
    const int two = codes[bit / 8] | codes[bit / 8 + 1] << 8;  // behind the last code stands the scale
    return static_cast<float>(two >> bit % 8 & ((1 << bits) - 1));
  }
};

}  // namespace

void attend_scalar(const Attention& a, const Span& s, float* scratch, const Partial& out) {
  const int64_t dim = a.cache.head_dim;
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t row = s.first_row + i;
    const int64_t first = a.first_key(row) > s.first_key ? a.first_key(row) : s.first_key;
    const int64_t last = smaller(a.end_key(row), s.last_key);
    const float* q = a.query(s.head, row);
    float* sums = out.sums + i * dim;
    float all = 0.0f, top = -INFINITY, total = 0.0f, base = 0.0f;
    for (int64_t c = 0; c < dim; ++c) all += q[c] * a.scale;
    for (int64_t key = first; key < last; ++key) {
      const Record k(a.cache, a.keys, s.head, key);
      float dot = 0.0f;
      for (int64_t c = 0; c < dim; ++c) dot += q[c] * a.scale * k.code(c);
      float* score = scratch + (key - first);
      *score = dot * k.scale + all * k.low;
      top = *score > top ? *score : top;
    }
    for (int64_t c = 0; c < dim; ++c) sums[c] = 0.0f;
    for (int64_t key = first; key < last; ++key) {
      const Record v(a.cache, a.values, s.head, key);
      const float p = std::exp(scratch[key - first] - top);
      total += p;
      base += p * v.low;
      for (int64_t c = 0; c < dim; ++c) sums[c] += p * v.scale * v.code(c);
    }
    for (int64_t c = 0; c < dim; ++c) sums[c] += base;
    out.top[i] = top;
    out.total[i] = total;
  }
}

}  // namespace bitwright
