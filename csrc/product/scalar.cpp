// The product, one weight at a time: the oracle of the others.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace bitwright {

void product_scalar(const uint8_t* weights, const Geometry& g, const Activations& a, const float* bias, float* y,
                    uint8_t* scratch, int64_t first, int64_t last) {
  (void)scratch;
  const TileLayout layout(g);
  const int64_t width = g.width();
  for (int64_t row = first * kTileRows; row < last * kTileRows && row < g.rows; ++row) {
    const uint8_t* tile = weights + row / kTileRows * layout.bytes;
    const int64_t place = row % kTileRows;
    for (int64_t token = 0; token < a.tokens; ++token) {
      float f = 0.0f;
      for (int64_t index = 0; index < g.groups(); ++index) {
        const uint8_t* group = tile + index * layout.group_bytes;
        const int64_t at = index * a.tokens + token;
        int32_t sum = 0;
        for (int64_t channel = 0; channel < g.channels(index); ++channel) {
          const int input = a.words ? a.words[at * width + channel] : a.codes[at * width + channel];
          sum += level_at(group, g, place, channel) * input;
        }
        uint16_t half;
        std::memcpy(&half, group + layout.scales + place * 2, 2);
        const float factor = half_to_float(half) * a.step[at];
        f = std::fmaf(static_cast<float>(sum), factor, f);
        if (a.rest[at] != 0.0f) {
          f = std::fmaf(static_cast<float>(level_sum(group, g, place, index)), factor * a.rest[at], f);
        }
      }
      if (g.outliers) {
        const int8_t* codes = a.outliers + token * g.outlier_width();
        int32_t sum = a.outlier_shift[token];
        for (int64_t channel = 0; channel < g.outlier_width(); ++channel) {
          sum += static_cast<int32_t>(tile[layout.outliers_at + channel / 4 * 128 + place * 4 + channel % 4]) *
                 codes[channel];
        }
        float scale;
        std::memcpy(&scale, tile + layout.outlier_scales_at + place * 4, 4);
        f = std::fmaf(static_cast<float>(sum), scale * a.outlier_step[token], f);
      }
      y[token * g.rows + row] = bias ? f + bias[row] : f;
    }
  }
}

}  // namespace bitwright
