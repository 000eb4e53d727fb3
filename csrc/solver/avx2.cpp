// Two vectors of eight rows; twelve sums of the update stay in registers.
#include <immintrin.h>

#include "refine_strip.h"

namespace bitwright {

namespace {

struct Madd {
  static BITWRIGHT_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
    sum = (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
  }
};

void assign(Feedback feedback, const Block& block) { assign_strip(feedback, block); }

void update(const float* errors, int64_t width, const float* panel, int64_t columns, float* later) {
  update_strip<Madd>(errors, width, panel, columns, later);
}

void refine(const Refinement& refinement) { refine_strip<Madd>(refinement); }

}  // namespace

const SolverKernels solver_avx2{assign, update, refine};

}  // namespace bitwright
