// The activation quantizer of each instruction set.
#pragma once
#include "../site.h"

namespace bitwright {

constexpr float kMinimumStep = 1e-5f, kMinimumOutlierStep = 1e-12f;

using QuantizeFunction = void(const float* x, const Geometry&, const Quantizer&, const Activations&, float* scratch,
                              int64_t first, int64_t last);

QuantizeFunction quantize_scalar, quantize_avx2, quantize_avx512, quantize_neon;

// Symmetric int8 codes of one token's outlier channels; few, so one version serves all.
void quantize_outliers(const float* values, const Geometry&, const Activations&, int64_t token);

}  // namespace bitwright
