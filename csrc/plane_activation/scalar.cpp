// The activation quantizer with bit planes, one value at a time: the oracle of the others (BWA, eq. 3, 4, 10 and 11).
#include <cmath>
#include <cstring>

#include "../planes/kernels.h"
#include "../activation/grid.h"

namespace bitwright {

void quantize_planes_scalar(const float* x, const Geometry& g, const PlaneQuantizer& q, const PlaneActivations& out,
                            float* scratch, int64_t first, int64_t last) {
  const PlaneLayout layout(g);
  const float top = 15.0f;
  for (int64_t token = first; token < last; ++token) {
    const float* row = in_site_order(x + token * g.columns, g.columns, q.order, scratch);
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), place = index * out.tokens + token;
      uint16_t* words = out.words + place * layout.lines * 2;
      uint8_t* ones = out.ones + place * layout.parts * kPlanes;
      Range range{values[0], values[0], true};
      widen(range, values, 0, channels);
      std::memset(words, 0, static_cast<size_t>(layout.lines * 4));
      std::memset(ones, 0, static_cast<size_t>(layout.parts * kPlanes));
      if (!range.finite) {
        for (int plane = 0; plane < kPlanes; ++plane) out.scales[place * kPlanes + plane] = NAN;
        out.offset[place] = NAN;
        continue;
      }
      const Grid grid = grid_of(range, q.cut, top);
      float totals[kPlanes][8] = {};
      int32_t counts[kPlanes] = {};
      for (int64_t i = 0; i < channels; ++i) {
        const float code = code_of(values[i], grid, top);
        const float error = values[i] - grid.step * (code - grid.zero);
        const float share = error / (code < 1.0f ? 1.0f : code);
        const unsigned bits = static_cast<unsigned>(code);
        for (int plane = 0; plane < kPlanes; ++plane) {
          if (!((bits >> plane) & 1)) continue;
          words[i / 4] = static_cast<uint16_t>(words[i / 4] | 1u << (4 * plane + i % 4));
          ++ones[i / (8 * kPartLines) * kPlanes + plane];
          ++counts[plane];
          totals[plane][i % 8] += share;
        }
      }
      for (int plane = 0; plane < kPlanes; ++plane) {
        float free_scale = grid.step;
        if (q.balance != Balance::none) {
          const float* s = totals[plane];
          const float total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
          const int64_t over = q.balance == Balance::literal ? channels : (counts[plane] < 1 ? 1 : counts[plane]);
          free_scale = grid.step + total / static_cast<float>(over);
        }
        out.scales[place * kPlanes + plane] = static_cast<float>(1 << plane) * free_scale;
      }
      out.offset[place] = -grid.step * grid.zero;
    }
    quantize_outliers(row + g.normal(), g, out.outliers, token);
  }
}

}  // namespace bitwright
