#include <cstring>

#include "kernels.h"

namespace bitwright {

void dense_scalar(const float* x, int64_t tokens, const uint16_t* weights, int64_t rows, int64_t columns, float* y,
                  int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t token = 0; token < tokens; ++token) {
      double sum = 0.0;
      for (int64_t i = 0; i < columns; ++i) {
        const uint32_t bits = static_cast<uint32_t>(weights[row * columns + i]) << 16;
        float weight;
        std::memcpy(&weight, &bits, 4);
        sum += static_cast<double>(weight) * x[token * columns + i];
      }
      y[token * rows + row] = static_cast<float>(sum);
    }
  }
}

}  // namespace bitwright
