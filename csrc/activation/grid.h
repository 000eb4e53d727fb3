// The first half of an activation quantizer: the values of a token in site order, the range of a group, its step and
// zero point (BWA, eq. 3 and 4). The byte codes and the bit planes are made from these.
#pragma once
#include <cmath>

#include "kernels.h"

namespace bitwright {

// One token's values in site order: `row` itself, or gathered into `scratch`.
BITWRIGHT_INLINE const float* in_site_order(const float* row, int64_t columns, const int32_t* order, float* scratch) {
  if (!order) return row;
  for (int64_t i = 0; i < columns; ++i) scratch[i] = row[order[i]];
  return scratch;
}

struct Range {
  float low, high;
  bool finite;
};

// Takes the values first..last of a group into a range that holds at least one value of it.
BITWRIGHT_INLINE void widen(Range& range, const float* values, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    range.low = values[i] < range.low ? values[i] : range.low;
    range.high = values[i] > range.high ? values[i] : range.high;
    range.finite = range.finite && std::isfinite(values[i]);
  }
}

struct Grid {
  float step, zero;
};

// `cut` is the share of the range taken off at each end, `top` the largest code.
BITWRIGHT_INLINE Grid grid_of(Range range, float cut, float top) {
  if (cut != 0.0f) {
    const float less = (range.high - range.low) * cut;
    range.low += less;
    range.high -= less;
  }
  float step = (range.high - range.low) / top;
  step = step < kMinimumStep ? kMinimumStep : step;
  return {step, -std::nearbyintf(range.low / step)};
}

// As the quantizer asks. A grid without a zero point has it in the middle of its codes: 8 of 0..15, for -8..7.
BITWRIGHT_INLINE Grid grid_of(Range range, const Quantizer& q, float top) {
  if (q.share == 0.0f) return grid_of(range, q.cut, top);
  const float magnitude = -range.low > range.high ? -range.low : range.high;
  const float step = magnitude * q.share / ((top - 1.0f) / 2.0f);
  return {step < kMinimumStep ? kMinimumStep : step, (top + 1.0f) / 2.0f};
}

// round(value / step) + zero, cut to 0..top. What is not a number (of a zero point beyond fp32) is 0, as
// _mm256_max_ps has it.
BITWRIGHT_INLINE float code_of(float value, Grid grid, float top) {
  const float code = std::nearbyintf(value / grid.step) + grid.zero;
  return code > 0.0f ? (code > top ? top : code) : 0.0f;
}

// The zero point as the byte codes can hold it.
BITWRIGHT_INLINE float clamped(float zero, float top) { return zero < 0.0f ? 0.0f : (zero > top ? top : zero); }

}  // namespace bitwright
