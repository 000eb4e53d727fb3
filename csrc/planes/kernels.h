// The quantizer and the product of each instruction set.
//
// All products do the same float operations in the same order for each output, so they agree to the last bit, whatever
// the number of tokens or threads. I_a is the exact integer sum of the levels of the channels whose bit in plane a is
// 1, S the sum of the levels of all channels of the group:
//     t = I_0 * mu_0
//     t = fma(I_a, mu_a, t)                             for planes 1, 2, 3
//     t = fma(S, offset, t)
//     f = fma(t, scale, f)                              for each group
//     f = fma(O, outlier_scale * outlier_step, f)       O the exact integer sum over the outliers
//     y = f + bias
//
// All quantizers add up the rounding errors of a plane in eight partial sums s_j, channel i in s_(i mod 8), ascending,
// and then ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7)).
#pragma once
#include "planes.h"

namespace bitwright {

using PlaneQuantizeFunction = void(const float* x, const Geometry&, const PlaneQuantizer&, const PlaneActivations&,
                                   float* scratch, int64_t first, int64_t last);
using PlaneProductFunction = void(const uint8_t* weights, const Geometry&, const PlaneActivations&, const float* bias,
                                  float* y, uint8_t* scratch, int64_t first, int64_t last);

PlaneQuantizeFunction quantize_planes_scalar, quantize_planes_avx2;
PlaneProductFunction planes_scalar, planes_avx2, planes_avx512, planes_avx512_emulated;

}  // namespace bitwright
