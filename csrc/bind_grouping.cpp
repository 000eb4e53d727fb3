#include "bind_grouping.h"

#include "address.h"
#include "solver/grouping.h"

namespace nb = nanobind;

namespace bitwright {

void bind_grouping(nb::module_& m) {
  m.def("merge_groups", [](uintptr_t count, uintptr_t mean, uintptr_t error, int64_t size, int64_t groups,
                           double penalty, uintptr_t begins) {
    nb::gil_scoped_release free;
    merge_groups(Members{at<const int64_t>(count), at<const double>(mean), at<const double>(error), size}, groups,
                 penalty, at<int64_t>(begins));
  });
  m.def("optimal_groups", [](uintptr_t values, uintptr_t counts, int64_t size, int64_t groups, double penalty,
                             uintptr_t begins) {
    nb::gil_scoped_release free;
    optimal_groups(at<const double>(values), at<const int64_t>(counts), size, groups, penalty, at<int64_t>(begins));
  });
  m.def("count_magnitudes", [](uintptr_t weights, int64_t count, uintptr_t counts) {
    nb::gil_scoped_release free;
    count_magnitudes(at<const uint16_t>(weights), count, at<int64_t>(counts));
  });
  m.def("encode_patterns", [](uintptr_t weights, int64_t rows, int64_t columns, int64_t stride, uintptr_t code_of,
                              int bits, uintptr_t planes) {
    nb::gil_scoped_release free;
    encode_patterns(at<const uint16_t>(weights), rows, columns, stride, at<const uint8_t>(code_of), bits,
                    at<uint8_t>(planes));
  });
}

}  // namespace bitwright
