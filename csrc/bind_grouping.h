// Python's view of solver/grouping.h; called by bind.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace bitwright {

void bind_grouping(nanobind::module_& m);

}  // namespace bitwright
