// The strip kernels, to be compiled for one instruction set after another. `Madd` says what a * b + c is there.
#pragma once
#include <cstring>

#include "../site.h"
#include "kernels.h"

namespace bitwright {

typedef float Vector __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(8)));
constexpr int64_t kVectors = kStripRows / 8;

BITWRIGHT_INLINE void load(const float* from, Vector& to) { std::memcpy(&to, from, sizeof(Vector)); }
BITWRIGHT_INLINE void store(const Vector& from, float* to) { std::memcpy(to, &from, sizeof(Vector)); }

// Nearest levels of one column, ties to the lower, and what is left of it.
BITWRIGHT_INLINE void round_column(const float* weights, const float* values, const float* middles, int count,
                                   uint8_t* ranks, float* residual) {
  for (int64_t v = 0; v < kVectors; ++v) {
    Vector weight, value, next, middle;
    Mask rank = {};
    load(weights + 8 * v, weight);
    load(values + 8 * v, value);
    for (int i = 1; i < count; ++i) {
      load(middles + (i - 1) * kStripRows + 8 * v, middle);
      load(values + i * kStripRows + 8 * v, next);
      const Mask above = weight > middle;
      rank -= above;
      value = above ? next : value;
    }
    store(weight - value, residual + 8 * v);
    const Bytes narrow = __builtin_convertvector(rank, Bytes);
    std::memcpy(ranks + 8 * v, &narrow, 8);
  }
}

// The same on an equally spaced grid, by arithmetic: round_on_grid of bitwright/solvers/grids.py.
BITWRIGHT_INLINE void round_column_on_grid(const Block& block, int64_t c) {
  const float top = static_cast<float>(block.count - 1), far = 1024.0f;
  for (int64_t v = 0; v < kVectors; ++v) {
    Vector weight, step, lowest;
    load(block.weights + c * kStripRows + 8 * v, weight);
    load(block.step + 8 * v, step);
    load(block.lowest + 8 * v, lowest);
    Vector place = weight / step - 0.5f;
    // Far outside of the grid, but inside of what an integer holds.
    place = place > far ? Vector{} + far : place;
    place = place < -far ? Vector{} - far : place;
    const Vector whole = __builtin_convertvector(__builtin_convertvector(place, Mask), Vector);
    Vector rank = (place > whole ? whole + 1.0f : whole) - lowest;
    rank = rank > top ? Vector{} + top : rank;
    rank = rank < 0.0f ? Vector{} : rank;
    store(weight - (rank + lowest) * step, block.errors + c * kStripRows + 8 * v);
    const Bytes narrow = __builtin_convertvector(__builtin_convertvector(rank, Mask), Bytes);
    std::memcpy(block.ranks + c * kStripRows + 8 * v, &narrow, 8);
  }
}

// errors[c] = residual[c] / U_cc, handed on to the columns after c. Product and difference are rounded one after the
// other, as torch does it.
BITWRIGHT_INLINE void hand_on(const Block& block, int64_t c, float* columns) {
  const float* row = block.upper + c * block.stride;
  float* own = block.errors + c * kStripRows;
  const int64_t width = block.width;
  Vector error[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    load(own + 8 * v, error[v]);
    error[v] = error[v] / row[c];
    store(error[v], own + 8 * v);
  }
  for (int64_t j = c + 1; j < width; ++j) {
    for (int64_t v = 0; v < kVectors; ++v) {
      Vector later;
      load(columns + j * kStripRows + 8 * v, later);
      later -= error[v] * row[j];
      store(later, columns + j * kStripRows + 8 * v);
    }
  }
}

BITWRIGHT_INLINE void assign_strip(Feedback feedback, const Block& block) {
  float middles[15 * kStripRows];
  for (int64_t i = 0; block.values && i < (block.count - 1) * kStripRows; ++i) {
    middles[i] = (block.values[i + kStripRows] + block.values[i]) / 2;
  }
  for (int64_t c = 0; c < block.width; ++c) {
    if (!block.values) {
      round_column_on_grid(block, c);
    } else {
      round_column(block.weights + c * kStripRows, block.values, middles, block.count, block.ranks + c * kStripRows,
                   block.errors + c * kStripRows);
    }
    if (feedback == Feedback::column) hand_on(block, c, block.weights);
  }
  for (int64_t c = 0; c < block.width; ++c) {
    if (feedback == Feedback::block_triangular) hand_on(block, c, block.errors);
    if (feedback != Feedback::block_diagonal) continue;
    const float diagonal = block.upper[c * (block.stride + 1)];
    for (int64_t i = 0; i < kStripRows; ++i) block.errors[c * kStripRows + i] /= diagonal;
  }
}

// One sum a weight, over the block's columns from left to right: the same whatever stands beside it.
template <typename Madd>
BITWRIGHT_INLINE void update_strip(const float* errors, int64_t width, const float* panel, int64_t columns,
                                   float* later) {
  for (int64_t first = 0; first < columns; first += kPanelStep) {
    Vector sums[kPanelStep][kVectors] = {};
    // They come from far away, and are wanted only after the sums.
    for (int64_t c = 0; c < kPanelStep; ++c) __builtin_prefetch(later + (first + c) * kStripRows, 1);
    for (int64_t k = 0; k < width; ++k) {
      Vector error[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) load(errors + k * kStripRows + 8 * v, error[v]);
      const float* u = panel + k * kPanel + first;
      for (int64_t c = 0; c < kPanelStep; ++c) {
        const float f = u[c];
        const Vector factor = {f, f, f, f, f, f, f, f};
        for (int64_t v = 0; v < kVectors; ++v) Madd::add(error[v], factor, sums[c][v]);
      }
    }
    for (int64_t c = 0; c < smaller(kPanelStep, columns - first); ++c) {
      for (int64_t v = 0; v < kVectors; ++v) {
        Vector before;
        float* place = later + (first + c) * kStripRows + 8 * v;
        load(place, before);
        store(before - sums[c][v], place);
      }
    }
  }
}

}  // namespace bitwright
