// The factor of the inverse Hessian that error feedback goes by.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace bitwright {

// hessian [size][size], of which the upper triangle is read -> upper [size][size], inverse(H + shift I) = U^T U.
// False, with `upper` left in any state, where H + shift I has no finite factor in fp32. The result does not depend on
// `threads`.
bool upper_factor(const SolverKernels&, const float* hessian, int64_t size, float shift, float* upper, int threads);

}  // namespace bitwright
