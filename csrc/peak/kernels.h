// How fast the processor multiplies and adds bytes: the product's arithmetic on registers alone, without loads or float
// steps. What a product of many tokens is measured against, since it depends on who shares the core at that moment.
#pragma once
#include <cstdint>

namespace bitwright {

// Does `rounds` rounds and returns how many weights times inputs that were.
using PeakFunction = int64_t(int64_t rounds);

PeakFunction peak_avx2, peak_avx512, peak_neon;

}  // namespace bitwright
