// The fast Walsh-Hadamard transform, one butterfly at a time: the oracle of the others.
#include <cmath>

#include "../decoder.h"

namespace bitwright {

void hadamard_scalar(const float* x, float* y, int64_t blocks, int64_t size) {
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
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

}  // namespace bitwright
