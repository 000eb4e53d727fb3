// The quantized linear of a site: quantize the inputs, multiply, share the work among threads.
#pragma once
#include "site.h"

namespace bitwright {

// y [tokens][rows] = W x + bias; x [tokens][columns] in the model's channel order, bias [rows] or null.
// The result does not depend on `threads`.
void site_linear(const Kernels&, const float* x, int64_t tokens, const uint8_t* packed, const Geometry&,
                 const Quantizer&, const float* bias, float* y, int threads);

// Only the quantizer; every pointer of `out` is the caller's.
void quantize_site(const Kernels&, const float* x, const Geometry&, const Quantizer&, const Activations& out,
                   int threads);

// y [tokens][rows] = W x, weights of 8- or 4-bit integers; x [tokens][columns].
void head_linear(const Kernels&, const HeadRows&, const float* x, int64_t tokens, float* y, int threads);

// y [tokens][rows] = W x, weights bfloat16 [rows][columns].
void dense_linear(const Kernels&, const float* x, int64_t tokens, const uint16_t* weights, int64_t rows,
                  int64_t columns, float* y, int threads);

}  // namespace bitwright
