// The quantized linear of a site by the boolean product, for free plane scales.
#pragma once
#include "planes/planes.h"

namespace bitwright {

// The functions for the variant of that name (isa.h): its own where it has them and this processor runs them, else the
// best that run.
const PlaneKernels& plane_kernels(const char* variant);

// As site_linear in ../linear.h.
void site_planes(const PlaneKernels&, const float* x, int64_t tokens, const uint8_t* packed, const Geometry&,
                 const PlaneQuantizer&, const float* bias, float* y, int threads);

// Only the quantizer; every pointer of `out` is the caller's.
void quantize_planes(const PlaneKernels&, const float* x, const Geometry&, const PlaneQuantizer&,
                     const PlaneActivations& out);

}  // namespace bitwright
