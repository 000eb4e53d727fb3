// Python's view of decoder.h; called by bind.cpp, which knows the chosen variant.
#pragma once
#include <nanobind/nanobind.h>

#include "decoder.h"

namespace bitwright {

void bind_decoder(nanobind::module_& m, DecoderKernels (*kernels)());

}  // namespace bitwright
