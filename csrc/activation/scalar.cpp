// The activation quantizer, one value at a time: the oracle of the others (BWA, eq. 3 and 4; docs/format.md).
#include <cmath>

#include "grid.h"

namespace bitwright {

void quantize_scalar(const float* x, const Geometry& g, const Quantizer& q, const Activations& out, float* scratch,
                     int64_t first, int64_t last) {
  const int64_t normal = g.normal(), width = g.width();
  const float top = static_cast<float>((1 << q.bits) - 1);
  for (int64_t token = first; token < last; ++token) {
    const float* row = in_site_order(x + token * g.columns, g.columns, q.order, scratch);
    for (int64_t index = 0; index < g.groups(); ++index) {
      const float* values = row + index * g.group;
      const int64_t channels = g.channels(index), place = index * out.tokens + token;
      int8_t* codes = out.codes + place * width;
      Range range{values[0], values[0], true};
      widen(range, values, 0, channels);
      const Grid grid = grid_of(range, q, top);
      const float inside = clamped(grid.zero, top);
      int32_t sum = 0;
      for (int64_t i = 0; i < channels; ++i) {
        const float code = code_of(values[i], grid, top);
        codes[i] = range.finite ? static_cast<int8_t>(code - inside) : 0;
        sum += codes[i];
      }
      for (int64_t i = channels; i < width; ++i) codes[i] = 0;
      out.step[place] = range.finite ? grid.step : NAN;
      out.rest[place] = range.finite ? inside - grid.zero : 0.0f;
      out.shift[place] = -128 * sum;
    }
    quantize_outliers(row + normal, g, out, token);
  }
}

void quantize_outliers(const float* values, const Geometry& g, const Activations& out, int64_t token) {
  if (g.outliers == 0) return;
  int8_t* codes = out.outliers + token * g.outlier_width();
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < g.outliers; ++i) {
    const float size = std::fabs(values[i]);
    largest = size > largest ? size : largest;
    finite = finite && std::isfinite(values[i]);
  }
  float step = largest / 127.0f;
  step = step < kMinimumOutlierStep ? kMinimumOutlierStep : step;
  int32_t sum = 0;
  for (int64_t i = 0; i < g.outliers; ++i) {
    float code = finite ? std::nearbyintf(values[i] / step) : 0.0f;
    code = code < -127.0f ? -127.0f : (code > 127.0f ? 127.0f : code);
    codes[i] = static_cast<int8_t>(code);
    sum += codes[i];
  }
  for (int64_t i = g.outliers; i < g.outlier_width(); ++i) codes[i] = 0;
  out.outlier_step[token] = finite ? step : NAN;
  out.outlier_shift[token] = -128 * sum;
}

}  // namespace bitwright
