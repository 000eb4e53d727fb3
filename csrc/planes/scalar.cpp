// The boolean product, one bit at a time: the oracle of the others.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace bitwright {

namespace {

float half_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half_to_float(half);
}

}  // namespace

void planes_scalar(const uint8_t* weights, const Geometry& g, const PlaneActivations& a, const float* bias, float* y,
                   uint8_t* scratch, int64_t first, int64_t last) {
  (void)scratch;
  const PlaneLayout layout(g);
  for (int64_t row = first * kTileRows; row < last * kTileRows && row < g.rows; ++row) {
    const uint8_t* tile = weights + row / kTileRows * layout.bytes;
    const int64_t place = row % kTileRows, byte = byte_of_row(place);
    for (int64_t token = 0; token < a.tokens; ++token) {
      float f = 0.0f;
      for (int64_t index = 0; index < g.groups(); ++index) {
        const uint8_t* group = tile + index * layout.group_bytes;
        const int64_t at = index * a.tokens + token;
        const uint16_t* words = a.words + at * (g.group / 4);
        int32_t sums[kPlanes] = {};
        for (int64_t channel = 0; channel < g.group; ++channel) {
          const uint8_t* line = group + layout.codes_at + channel / 8 * 64;
          const int code = ((line[byte] >> (channel % 8)) & 1) | (((line[32 + byte] >> (channel % 8)) & 1) << 1);
          const int level = static_cast<int8_t>(group[PlaneLayout::kLevels + place * 4 + code]);
          for (int plane = 0; plane < kPlanes; ++plane) {
            if ((words[channel / 4] >> (4 * plane + channel % 4)) & 1) sums[plane] += level;
          }
        }
        int32_t all = 0;
        for (int64_t part = 0; part < layout.parts; ++part) {
          int16_t sum;
          std::memcpy(&sum, group + PlaneLayout::kSums + (part * kTileRows + place) * 2, 2);
          all += sum;
        }
        const float* mu = a.scales + at * kPlanes;
        float t = static_cast<float>(sums[0]) * mu[0];
        for (int plane = 1; plane < kPlanes; ++plane) t = std::fmaf(static_cast<float>(sums[plane]), mu[plane], t);
        t = std::fmaf(static_cast<float>(all), a.offset[at], t);
        f = std::fmaf(t, half_at(group + PlaneLayout::kScales + place * 2), f);
      }
      if (g.outliers) {
        const int8_t* codes = a.outliers.outliers + token * g.outlier_width();
        int32_t sum = a.outliers.outlier_shift[token];
        for (int64_t channel = 0; channel < g.outlier_width(); ++channel) {
          sum += static_cast<int32_t>(tile[layout.outliers_at + channel / 4 * 128 + place * 4 + channel % 4]) *
                 codes[channel];
        }
        float scale;
        std::memcpy(&scale, tile + layout.outlier_scales_at + place * 4, 4);
        f = std::fmaf(static_cast<float>(sum), scale * a.outliers.outlier_step[token], f);
      }
      y[token * g.rows + row] = bias ? f + bias[row] : f;
    }
  }
}

}  // namespace bitwright
