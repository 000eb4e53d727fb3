#include <cmath>

#include "kernels.h"

namespace bitwright {

namespace {

float code_of(const HeadRows& w, int64_t row, int64_t channel) {
  const uint8_t* codes = w.codes + row * w.row_bytes();
  if (w.bits == 8) return static_cast<float>(static_cast<int8_t>(codes[channel]));
  const int nibble = (codes[channel / 2] >> (channel % 2 * 4)) & 15;
  return static_cast<float>(nibble < 8 ? nibble : nibble - 16) / w.unit();
}

}  // namespace

void head_scalar(const HeadRows& w, const float* x, int64_t tokens, float* y, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t token = 0; token < tokens; ++token) {
      float t[8] = {};
      for (int64_t group = 0; group < w.groups(); ++group) {
        float s[8] = {};
        const int64_t end = smaller(w.columns, (group + 1) * w.group);
        for (int64_t i = group * w.group; i < end; ++i) {
          s[i % 8] = std::fma(code_of(w, row, i), x[token * w.columns + i], s[i % 8]);
        }
        const float scale = half_to_float(w.scales[row * w.groups() + group]) * w.unit();
        for (int l = 0; l < 8; ++l) t[l] = std::fma(s[l], scale, t[l]);
      }
      y[token * w.rows + row] = ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
    }
  }
}

}  // namespace bitwright
