// Levels refitted and codes exchanged in one block of columns under its square of the Hessian, row by row independent.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "levels.h"

namespace bitwright {

// One strip of rows; those that do not exist are zeros.
struct Refinement {
  int64_t width, rows;  // rows of the strip that are there
  int count;            // levels of a row
  const float* square;  // S [width][width], symmetric
  const float* target;  // [width][16]
  int8_t* integers;     // [16][count], ascending
  float* scales;        // [16], fp16 numbers
  uint8_t* ranks;       // [width][16]
  float* scratch;       // [width][16] twice, [count][width]
  uint8_t* fresh_ranks; // [width][16]
};

// Levels of one row that minimise its loss for its ranks, ascending: the normal equations with a small ridge towards the
// levels of before. sums [count][width] are the rows of S summed by rank.
void fit_levels(const Refinement&, int64_t row, const float* sums, const float* before, float* levels);

// target fp32 [rows][width], square fp32 [width][width] -> integers [rows][count] by rank, scales fp16 [rows] and ranks
// [rows][width] replaced, in each row where that lowers (target - Q) S (target - Q)^T. Independent of `threads`.
void refine_block(const SolverKernels&, const float* target, const float* square, int64_t rows, int64_t width, int count,
                  int8_t* integers, uint16_t* scales, uint8_t* ranks, int threads);

}  // namespace bitwright
