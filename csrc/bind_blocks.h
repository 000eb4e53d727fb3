// Python's view of blocks.h.
#pragma once
#include <nanobind/nanobind.h>

#include "blocks.h"

namespace bitwright {

void bind_blocks(nanobind::module_& m, AllKernels (*kernels)());

}  // namespace bitwright
