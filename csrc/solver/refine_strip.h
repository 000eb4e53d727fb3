// One block of columns refitted and exchanged (bitwright/solvers/refine.py, improve), to be compiled for one instruction
// set after another. `Madd` as in strip.h.
#pragma once
#include "refine.h"
#include "strip.h"

namespace bitwright {

// gradient += left row, an outer product: left [16], row [width], gradient [width][16].
template <typename Madd>
BITWRIGHT_INLINE void add_row(const Refinement& r, const Vector (&left)[kVectors], const float* row, float* gradient) {
  for (int64_t j = 0; j < r.width; ++j) {
    const float f = row[j];
    const Vector factor = {f, f, f, f, f, f, f, f};
    for (int64_t v = 0; v < kVectors; ++v) {
      Vector sum;
      load(gradient + j * kStripRows + 8 * v, sum);
      Madd::add(left[v], factor, sum);
      store(sum, gradient + j * kStripRows + 8 * v);
    }
  }
}

// gradient = residual S, each [width][16].
template <typename Madd>
BITWRIGHT_INLINE void gradient_strip(const Refinement& r, const float* residual, float* gradient) {
  std::memset(gradient, 0, static_cast<size_t>(r.width * kStripRows) * sizeof(float));
  for (int64_t c = 0; c < r.width; ++c) {
    Vector left[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) load(residual + c * kStripRows + 8 * v, left[v]);
    add_row<Madd>(r, left, r.square + c * r.width, gradient);
  }
}

// residual = target - values at their ranks.
BITWRIGHT_INLINE void residual_strip(const Refinement& r, const float* values, const uint8_t* ranks, float* residual) {
  for (int64_t i = 0; i < r.width * kStripRows; ++i) {
    residual[i] = r.target[i] - values[ranks[i] * kStripRows + i % kStripRows];
  }
}

// Of each row, (target - Q) S (target - Q)^T.
BITWRIGHT_INLINE void loss_strip(const Refinement& r, const float* residual, const float* gradient, float* loss) {
  Vector sums[kVectors] = {};
  for (int64_t c = 0; c < r.width; ++c) {
    for (int64_t v = 0; v < kVectors; ++v) {
      Vector a, b;
      load(residual + c * kStripRows + 8 * v, a);
      load(gradient + c * kStripRows + 8 * v, b);
      sums[v] += a * b;
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) store(sums[v], loss + 8 * v);
}

// Sums of the rows of S whose columns share a rank: [count][width], for row `row` of the strip.
BITWRIGHT_INLINE void members_of_row(const Refinement& r, int64_t row, float* sums) {
  std::memset(sums, 0, static_cast<size_t>(r.count * r.width) * sizeof(float));
  for (int64_t c = 0; c < r.width; ++c) {
    float* to = sums + r.ranks[c * kStripRows + row] * r.width;
    const float* from = r.square + c * r.width;
    for (int64_t j = 0; j < r.width; ++j) to[j] += from[j];
  }
}

// Each column in turn takes the level that is best with all others as they are.
template <typename Madd>
BITWRIGHT_INLINE void descend_strip(const Refinement& r, const float* values, uint8_t* ranks, float* residual,
                                    float* gradient) {
  float middles[kMostLevels * kStripRows], wanted[kStripRows], left[kStripRows];
  for (int64_t i = 0; i < (r.count - 1) * kStripRows; ++i) middles[i] = (values[i + kStripRows] + values[i]) / 2;
  for (int64_t c = 0; c < r.width; ++c) {
    const float* row = r.square + c * r.width;
    const float inverse = 1.0f / row[c];
    float now[kStripRows];
    for (int64_t i = 0; i < kStripRows; ++i) {
      now[i] = values[ranks[c * kStripRows + i] * kStripRows + i];
      wanted[i] = now[i] + gradient[c * kStripRows + i] * inverse;
    }
    round_column(wanted, values, middles, r.count, ranks + c * kStripRows, left);
    Vector change[kVectors];
    bool changed = false;
    for (int64_t i = 0; i < kStripRows; ++i) {
      left[i] = values[ranks[c * kStripRows + i] * kStripRows + i] - now[i];
      residual[c * kStripRows + i] -= left[i];
      changed |= left[i] != 0.0f;
      left[i] = -left[i];
    }
    if (!changed) continue;
    for (int64_t v = 0; v < kVectors; ++v) load(left + 8 * v, change[v]);
    add_row<Madd>(r, change, row, gradient);
  }
}

// The strip's rows: levels, scales and ranks, replaced where that lowers a row's loss.
template <typename Madd>
BITWRIGHT_INLINE void refine_strip(const Refinement& r) {
  const int64_t cells = r.width * kStripRows, table = r.count * kStripRows;
  float *residual = r.scratch, *gradient = residual + cells, *sums = gradient + cells;
  uint8_t* ranks = r.fresh_ranks;
  float before[kStripRows], after[kStripRows], values[kMostLevels * kStripRows], fitted[kMostLevels * kStripRows] = {};
  GridRow grids[kStripRows] = {};
  for (int64_t i = 0; i < table; ++i) {
    values[i] = static_cast<float>(r.integers[i % kStripRows * r.count + i / kStripRows]) * r.scales[i % kStripRows];
  }
  residual_strip(r, values, r.ranks, residual);
  gradient_strip<Madd>(r, residual, gradient);
  loss_strip(r, residual, gradient, before);
  for (int64_t row = 0; row < r.rows; ++row) {
    members_of_row(r, row, sums);
    float column[kMostLevels], levels[kMostLevels];
    for (int k = 0; k < r.count; ++k) column[k] = values[k * kStripRows + row];
    fit_levels(r, row, sums, column, levels);
    grids[row] = snap(levels, r.count);
    const float scale = half_to_float(grids[row].scale);
    uint8_t moved[kMostLevels];  // the rank of the fitted level that is nearest to each of before
    for (int k = 0; k < r.count; ++k) fitted[k * kStripRows + row] = static_cast<float>(grids[row].integers[k]) * scale;
    for (int k = 0; k < r.count; ++k) {
      uint8_t rank = 0;
      for (int i = 1; i < r.count; ++i) {
        rank += column[k] > (fitted[i * kStripRows + row] + fitted[(i - 1) * kStripRows + row]) / 2;
      }
      moved[k] = rank;
    }
    for (int64_t c = 0; c < r.width; ++c) ranks[c * kStripRows + row] = moved[r.ranks[c * kStripRows + row]];
  }
  for (int64_t i = 0; i < cells; ++i) {
    if (i % kStripRows >= r.rows) ranks[i] = 0;
  }
  residual_strip(r, fitted, ranks, residual);
  gradient_strip<Madd>(r, residual, gradient);
  descend_strip<Madd>(r, fitted, ranks, residual, gradient);
  loss_strip(r, residual, gradient, after);
  for (int64_t row = 0; row < r.rows; ++row) {
    if (!(after[row] < before[row])) continue;
    for (int k = 0; k < r.count; ++k) r.integers[row * r.count + k] = grids[row].integers[k];
    r.scales[row] = half_to_float(grids[row].scale);
    for (int64_t c = 0; c < r.width; ++c) r.ranks[c * kStripRows + row] = ranks[c * kStripRows + row];
  }
}

}  // namespace bitwright
