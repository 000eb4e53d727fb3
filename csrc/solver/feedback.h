// The block loop of a feedback solver over many rows (bitwright/solvers/feedback.py, solve_rows).
#pragma once
#include <cstdint>

#include "kernels.h"
#include "levels.h"

namespace bitwright {

// fp32 row-major; site order, the outlier columns last.
struct SolveInputs {
  const float* weights;     // [rows][columns]
  const float* upper;       // [columns][columns], U
  const float* importance;  // [columns]
  const uint8_t* dead;      // [columns], 1 where the input was never active
  int64_t rows, columns, outliers, group;
};

struct SolveOptions {
  LevelSearch levels;
  Feedback feedback;
  int bits, iterations;
  bool symmetric;  // of a uniform grid, as LevelFinder has it, as `clip`
  float clip;
  bool feedback_outliers;
};

// As in docs/format.md, zeroed by nobody: every byte is written.
struct SolveOutputs {
  uint8_t* planes;           // [bits][rows][ceil(normal / 8)]
  uint16_t* scales;          // [rows][groups], fp16
  int8_t* levels;            // [rows][groups][2^bits], or null for other than a free codebook
  uint8_t* zeros;            // [rows][groups], or null for other than a uniform one
  int8_t* outliers;          // [rows][outliers], or null
  uint16_t* outlier_scales;  // [rows], fp16, or null
};

// Rows do not influence each other, and the result does not depend on `threads`. `group` is a multiple of 8.
void solve_rows(const SolverKernels&, const SolveInputs&, const SolveOptions&, const SolveOutputs&, int threads);

}  // namespace bitwright
