// Which instruction sets this processor has, and the functions for each.
#pragma once
#include "decoder.h"
#include "site.h"

namespace bitwright {

// All variants in this build, best first; `runs` says whether this processor can execute one.
struct Variant {
  Kernels kernels;
  bool runs;
  DecoderKernels decoder;
};
const Variant* variants(int* count);

// The variant of that name, or null; a null name gives the best that runs.
const Variant* find_variant(const char* name);

}  // namespace bitwright
