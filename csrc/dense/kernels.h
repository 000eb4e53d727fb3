// y = W x for the matrices that stay in bfloat16, first of all the output head: one row after the other, as fast as they
// can be read. torch's own bfloat16 product takes twenty times as long on processors without bfloat16 arithmetic.
#pragma once
#include "../site.h"

namespace bitwright {

// rows first..last of y [tokens][rows]; weights bfloat16 [rows][columns], x fp32 [tokens][columns]
using DenseFunction = void(const float* x, int64_t tokens, const uint16_t* weights, int64_t rows, int64_t columns,
                           float* y, int64_t first, int64_t last);

DenseFunction dense_scalar, dense_avx2, dense_neon;

}  // namespace bitwright
