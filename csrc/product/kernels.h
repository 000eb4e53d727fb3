// The product of each instruction set: y = W x from tiles of packed weights and quantized inputs.
//
// All of them do the same float operations in the same order for each output, so they agree to the last bit, whatever
// the number of tokens or threads:
//     f = fma(D, scale * step, f)                       for each group, D the exact integer sum (beyond 2^24: rounded)
//     f = fma(L, (scale * step) * rest, f)              where rest is not 0, L the sum of the group's levels
//     f = fma(O, outlier_scale * outlier_step, f)       O the exact integer sum over the outliers
//     y = f + bias
#pragma once
#include "../site.h"

namespace bitwright {

using ProductFunction = void(const uint8_t* weights, const Geometry&, const Activations&, const float* bias, float* y,
                             uint8_t* scratch, int64_t first, int64_t last);

ProductFunction product_scalar, product_avx2, product_avx512, product_neon;

// Which copy of a product serves these: run(form, inputs) with the form of the stored weights, and Narrow for inputs of
// up to four bits, Wide beyond.
template <typename Narrow, typename Wide, typename Run>
void with_form(const Geometry& g, const Activations& a, Run run) {
  const auto with = [&](auto form) { a.words ? run(form, Wide{}) : run(form, Narrow{}); };
  if (g.stored() == 2) return with(Pairs{});
  if (g.stored() == 8) return with(Form<8, false>{});
  g.table ? with(Form<4, true>{}) : with(Form<4, false>{});
}

}  // namespace bitwright
