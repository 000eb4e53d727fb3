#include "refine.h"

#include <algorithm>
#include <cmath>

#include "../site.h"
#include "memory.h"

namespace bitwright {

namespace {

constexpr double kRidge = 1e-6;  // of the mean diagonal: a level without weights keeps its place

// a x = b for a symmetric positive definite a [n][n], by Cholesky; a and b are overwritten. False where it has no factor.
bool solve_positive(double* a, double* b, int n) {
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = a[i * n + j];
      for (int k = 0; k < j; ++k) sum -= a[i * n + k] * a[j * n + k];
      if (i == j && !(sum > 0.0)) return false;
      a[i * n + j] = i == j ? std::sqrt(sum) : sum / a[j * n + j];
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < i; ++k) b[i] -= a[i * n + k] * b[k];
    b[i] /= a[i * n + i];
  }
  for (int i = n - 1; i >= 0; --i) {
    for (int k = i + 1; k < n; ++k) b[i] -= a[k * n + i] * b[k];
    b[i] /= a[i * n + i];
  }
  return true;
}

}  // namespace

void fit_levels(const Refinement& r, int64_t row, const float* sums, const float* before, float* levels) {
  const int n = r.count;
  double normal[kMostLevels * kMostLevels] = {}, right[kMostLevels] = {}, mean = 0.0;
  for (int k = 0; k < n; ++k) {
    const float* sum = sums + k * r.width;
    for (int64_t c = 0; c < r.width; ++c) {
      normal[k * n + r.ranks[c * kStripRows + row]] += static_cast<double>(sum[c]);
      right[k] += static_cast<double>(sum[c]) * static_cast<double>(r.target[c * kStripRows + row]);
    }
    mean += normal[k * n + k] / n;
  }
  const double ridge = kRidge * mean + 1e-30;
  for (int k = 0; k < n; ++k) {
    normal[k * n + k] += ridge;
    right[k] += ridge * static_cast<double>(before[k]);
  }
  const bool solved = solve_positive(normal, right, n);
  for (int k = 0; k < n; ++k) levels[k] = solved ? static_cast<float>(right[k]) : before[k];
  std::sort(levels, levels + n);
}

void refine_block(const SolverKernels& kernels, const float* target, const float* square, int64_t rows, int64_t width,
                  int count, int8_t* integers, uint16_t* scales, uint8_t* ranks, int threads) {
  const int64_t strips = (rows + kStripRows - 1) / kStripRows, cells = width * kStripRows;
  const int used = static_cast<int>(smaller<int64_t>(threads, strips));
#pragma omp parallel num_threads(used) if (used > 1)
  {
    const auto floats = make_array<float>(3 * cells + count * width);
    const auto bytes = make_array<uint8_t>(2 * cells);
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = strip * kStripRows, present = smaller(kStripRows, rows - first);
      float step[kStripRows];
      int8_t levels[kStripRows * kMostLevels] = {};
      for (int64_t i = 0; i < kStripRows; ++i) {
        const bool there = i < present;
        step[i] = there ? half_to_float(scales[first + i]) : 1.0f;
        for (int k = 0; k < count; ++k) {
          levels[i * count + k] = there ? integers[(first + i) * count + k] : static_cast<int8_t>(k);
        }
        for (int64_t c = 0; c < width; ++c) {
          floats[c * kStripRows + i] = there ? target[(first + i) * width + c] : 0.0f;
          bytes[c * kStripRows + i] = there ? ranks[(first + i) * width + c] : 0;
        }
      }
      kernels.refine(Refinement{width, present, count, square, floats.get(), levels, step, bytes.get(),
                                floats.get() + cells, bytes.get() + cells});
      for (int64_t i = 0; i < present; ++i) {
        scales[first + i] = float_to_half(step[i]);
        for (int k = 0; k < count; ++k) integers[(first + i) * count + k] = levels[i * count + k];
        for (int64_t c = 0; c < width; ++c) ranks[(first + i) * width + c] = bytes[c * kStripRows + i];
      }
    }
  }
}

}  // namespace bitwright
