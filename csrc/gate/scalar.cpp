// The gated activation, one value at a time.
#include <cmath>

#include "../decoder.h"

namespace bitwright {

void gate_scalar(const float* gate, const float* up, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

}  // namespace bitwright
