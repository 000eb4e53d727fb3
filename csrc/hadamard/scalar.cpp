// The fast Walsh-Hadamard transform, one butterfly at a time, and dense factors: the oracle of the others.
#include "../decoder.h"

namespace bitwright {

void hadamard_scalar(const float* x, float* y, int64_t blocks, int64_t size, float factor) {
  for (int64_t block = 0; block < blocks; ++block, x += size, y += size) {
    for (int64_t i = 0; i < size; ++i) y[i] = x[i] * factor;
    for (int64_t distance = 1; distance < size; distance *= 2) {
      for (int64_t start = 0; start < size; start += 2 * distance) {
        for (int64_t i = start; i < start + distance; ++i) {
          const float a = y[i], b = y[i + distance];
          y[i] = a + b;
          y[i + distance] = a - b;
        }
      }
    }
  }
}

void signed_sums_scalar(float* values, int64_t order, int64_t stride, int64_t width, const uint8_t* signs,
                        float* tables) {
  constexpr int64_t kColumns = kSignedColumns;
  for (int64_t group = 0; group < order / 4; ++group) {
    const float* x = values + group * 4 * stride;
    float* table = tables + group * 16 * kColumns;
    for (int64_t i = 0; i < width; ++i) {
      const float x0 = x[i], x1 = x[stride + i], x2 = x[2 * stride + i], x3 = x[3 * stride + i];
      const float low[4] = {x0 + x1, x1 - x0, x0 - x1, -(x0 + x1)};
      const float high[4] = {x2 + x3, x3 - x2, x2 - x3, -(x2 + x3)};
      for (int sign = 0; sign < 16; ++sign) table[sign * kColumns + i] = low[sign & 3] + high[sign >> 2];
    }
  }
  for (int64_t row = 0; row < order; ++row) {
    float sum[kColumns];
    for (int64_t group = 0; group < order / 4; ++group, ++signs) {
      const float* entry = tables + group * 16 * kColumns + *signs;
      for (int64_t i = 0; i < width; ++i) sum[i] = group ? sum[i] + entry[i] : entry[i];
    }
    for (int64_t i = 0; i < width; ++i) values[row * stride + i] = sum[i];
  }
}

}  // namespace bitwright
