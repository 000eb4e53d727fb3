// For any processor: the compiler's vectors.
#include "refine_strip.h"

namespace bitwright {

namespace {

struct Madd {
  static BITWRIGHT_INLINE void add(const Vector& a, const Vector& b, Vector& sum) {
#if defined(__aarch64__)
    // Every such processor has it, and a fused sum agrees with the other variants.
    for (int i = 0; i < 8; ++i) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
#else
    sum += a * b;
#endif
  }
};

void assign(Feedback feedback, const Block& block) { assign_strip(feedback, block); }

void update(const float* errors, int64_t width, const float* panel, int64_t columns, float* later) {
  update_strip<Madd>(errors, width, panel, columns, later);
}

void refine(const Refinement& refinement) { refine_strip<Madd>(refinement); }

}  // namespace

const SolverKernels solver_scalar{assign, update, refine};

}  // namespace bitwright
