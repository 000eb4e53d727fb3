// The parts of the block loop that pay for an instruction set. They work on strips: 16 rows, one next to the other, so
// that a vector holds the same column of several rows and no row knows of its neighbours.
#pragma once
#include <cstdint>

namespace bitwright {

constexpr int64_t kStripRows = 16;
constexpr int64_t kPanel = 96;  // later columns of U that are packed together, in steps of kPanelStep
constexpr int64_t kPanelStep = 6;

enum class Feedback : int { none = 0, block_diagonal = 1, block_triangular = 2, column = 3 };

// One block of columns of a strip.
struct Block {
  int64_t width;
  float* weights;         // [width][16]; `column` changes them
  const float* values;    // [count][16], ascending; null where the levels are lowest, lowest + 1, .. times step
  int count;
  const float* upper;     // diagonal block of U, rows `stride` apart
  int64_t stride;
  uint8_t* ranks;         // [width][16]
  float* errors;          // [width][16]: the later columns change by -U[block, later]^T errors
  const float* step = nullptr;    // [16], positive; with `lowest` in place of values
  const float* lowest = nullptr;  // [16], whole numbers
};

struct Refinement;  // refine.h

struct SolverKernels {
  void (*assign)(Feedback, const Block&);
  // later [columns][16] -= panel^T errors; errors [width][16], panel [width][kPanel], columns <= kPanel
  void (*update)(const float* errors, int64_t width, const float* panel, int64_t columns, float* later);
  void (*refine)(const Refinement&);
};

// For the variant of that name (csrc/isa.h); every name has one.
const SolverKernels& solver_kernels(const char* variant);

extern const SolverKernels solver_scalar, solver_avx2;

}  // namespace bitwright
