// The Python module: addresses as integers, checked by the caller; nothing of torch, nothing that copies.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <nanobind/stl/pair.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "address.h"
#include "bind_blocks.h"
#include "bind_decoder.h"
#include "bind_grouping.h"
#include "head/kernels.h"
#include "isa.h"
#include "linear.h"
#include "pack.h"
#include "plane_linear.h"
#include "plane_pack.h"
#include "read.h"
#include "solver/factor.h"
#include "solver/feedback.h"
#include "solver/levels.h"
#include "solver/refine.h"

namespace nb = nanobind;
using namespace bitwright;

namespace {

const Variant* chosen = nullptr;

const Variant& variant() {
  if (!chosen) chosen = find_variant(nullptr);
  return *chosen;
}

const Kernels& kernels() { return variant().kernels; }

std::vector<std::pair<std::string, bool>> list_variants() {
  int count;
  const Variant* all = variants(&count);
  std::vector<std::pair<std::string, bool>> found;
  for (int i = 0; i < count; ++i) found.emplace_back(all[i].kernels.name, all[i].runs);
  return found;
}

const PlaneKernels& planes() { return plane_kernels(kernels().name); }

void choose(const std::string& name) {
  const Variant* variant = find_variant(name.c_str());
  if (!variant) throw std::invalid_argument("no variant of that name in this build");
  if (!variant->runs) throw std::invalid_argument("this processor cannot run it");
  chosen = variant;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "bitwright's kernels. Arguments are addresses and sizes; use bitwright.runtime, which checks them.";
  m.def("variants", &list_variants);
  m.def("choose", &choose);
  m.def("chosen", [] { return std::string(kernels().name); });
  m.def("pack", [](uintptr_t codes, uintptr_t scales, uintptr_t levels, uintptr_t zeros, uintptr_t outlier_codes,
                   uintptr_t outlier_scales, int64_t rows, int64_t columns, int64_t outliers, int64_t group,
                   uintptr_t packed, int threads) {
    const Neutral from{at<const uint8_t>(codes),         at<const uint16_t>(scales),
                       at<const int8_t>(levels),         at<const uint8_t>(zeros),
                       at<const int8_t>(outlier_codes), at<const uint16_t>(outlier_scales)};
    nb::gil_scoped_release free;
    pack(from, Geometry{rows, columns, outliers, group}, at<uint8_t>(packed), threads);
  });
  m.def("unpack", [](uintptr_t packed, int64_t rows, int64_t columns, int64_t outliers, int64_t group, int64_t first,
                     int64_t last, uintptr_t weights, int threads) {
    nb::gil_scoped_release free;
    unpack(at<const uint8_t>(packed), Geometry{rows, columns, outliers, group}, first, last, at<float>(weights),
           threads);
  });
  m.def("site_linear", [](uintptr_t x, int64_t tokens, uintptr_t packed, int64_t rows, int64_t columns,
                          int64_t outliers, int64_t group, uintptr_t order, float cut, int bits, float share,
                          uintptr_t bias, uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    site_linear(kernels(), at<const float>(x), tokens, at<const uint8_t>(packed),
                Geometry{rows, columns, outliers, group}, Quantizer{at<const int32_t>(order), cut, bits, share},
                at<const float>(bias), at<float>(y), threads);
  });
  m.def("read_memory", [](uintptr_t words, int64_t count, int threads) {
    nb::gil_scoped_release free;
    return read_memory(at<const uint64_t>(words), count, threads);
  });
  m.def("peak", [](int64_t rounds, int threads) {
    nb::gil_scoped_release free;
    int64_t done = 0;
    if (!kernels().peak) return done;
#pragma omp parallel num_threads(threads) reduction(+ : done)
    done += kernels().peak(rounds);
    return done;
  });
  m.def("dense_linear", [](uintptr_t x, int64_t tokens, uintptr_t weights, int64_t rows, int64_t columns, uintptr_t y,
                           int threads) {
    nb::gil_scoped_release free;
    dense_linear(kernels(), at<const float>(x), tokens, at<const uint16_t>(weights), rows, columns, at<float>(y),
                 threads);
  });
  m.def("head_linear", [](uintptr_t x, int64_t tokens, uintptr_t codes, uintptr_t scales, int64_t rows,
                          int64_t columns, int64_t group, int bits, uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    head_linear(kernels(), HeadRows{at<const uint8_t>(codes), at<const uint16_t>(scales), rows, columns, group, bits},
                at<const float>(x), tokens, at<float>(y), threads);
  });
  m.def("quantize_site", [](uintptr_t x, int64_t tokens, int64_t columns, int64_t outliers, int64_t group,
                            uintptr_t order, float cut, int bits, float share, uintptr_t codes, uintptr_t step,
                            uintptr_t rest,
                            uintptr_t shift, uintptr_t outlier_codes, uintptr_t outlier_step, uintptr_t outlier_shift,
                            int threads) {
    nb::gil_scoped_release free;
    quantize_site(kernels(), at<const float>(x), Geometry{0, columns, outliers, group},
                  Quantizer{at<const int32_t>(order), cut, bits, share},
                  Activations{tokens, at<int8_t>(codes), at<float>(step), at<float>(rest), at<int32_t>(shift),
                              at<int8_t>(outlier_codes), at<float>(outlier_step), at<int32_t>(outlier_shift)},
                  threads);
  });
  bind_decoder(m, [] { return variant().decoder; });
  bind_grouping(m);
  bind_blocks(m, [] { return AllKernels{kernels(), planes(), variant().decoder}; });
  m.def("chosen_planes", [] { return std::string(planes().name); });
  m.def("pack_planes", [](uintptr_t codes, uintptr_t scales, uintptr_t levels, uintptr_t zeros,
                          uintptr_t outlier_codes, uintptr_t outlier_scales, int64_t rows, int64_t columns,
                          int64_t outliers, int64_t group, uintptr_t packed, int threads) {
    const Neutral from{at<const uint8_t>(codes),         at<const uint16_t>(scales),
                       at<const int8_t>(levels),         at<const uint8_t>(zeros),
                       at<const int8_t>(outlier_codes), at<const uint16_t>(outlier_scales)};
    nb::gil_scoped_release free;
    pack_planes(from, Geometry{rows, columns, outliers, group}, at<uint8_t>(packed), threads);
  });
  m.def("site_planes", [](uintptr_t x, int64_t tokens, uintptr_t packed, int64_t rows, int64_t columns,
                          int64_t outliers, int64_t group, uintptr_t order, float cut, int balance, uintptr_t bias,
                          uintptr_t y, int threads) {
    nb::gil_scoped_release free;
    site_planes(planes(), at<const float>(x), tokens, at<const uint8_t>(packed),
                Geometry{rows, columns, outliers, group},
                PlaneQuantizer{at<const int32_t>(order), cut, static_cast<Balance>(balance)}, at<const float>(bias),
                at<float>(y), threads);
  });
  m.def("quantize_planes", [](uintptr_t x, int64_t tokens, int64_t columns, int64_t outliers, int64_t group,
                              uintptr_t order, float cut, int balance, uintptr_t words, uintptr_t ones,
                              uintptr_t scales, uintptr_t offset, uintptr_t outlier_codes, uintptr_t outlier_step,
                              uintptr_t outlier_shift) {
    nb::gil_scoped_release free;
    PlaneActivations out{tokens, at<uint16_t>(words), at<uint8_t>(ones), at<float>(scales), at<float>(offset), {}};
    out.outliers.outliers = at<int8_t>(outlier_codes);
    out.outliers.outlier_step = at<float>(outlier_step);
    out.outliers.outlier_shift = at<int32_t>(outlier_shift);
    quantize_planes(planes(), at<const float>(x), Geometry{0, columns, outliers, group},
                    PlaneQuantizer{at<const int32_t>(order), cut, static_cast<Balance>(balance)}, out);
  });
  m.def("solve_rows", [](uintptr_t weights, uintptr_t upper, uintptr_t importance, uintptr_t dead, int64_t rows,
                         int64_t columns, int64_t outliers, int64_t group, int levels, int feedback, int bits,
                         int iterations, bool symmetric, float clip, bool feedback_outliers, uintptr_t planes, uintptr_t scales,
                         uintptr_t level_codes, uintptr_t zeros, uintptr_t outlier_codes, uintptr_t outlier_scales,
                         int threads) {
    const SolverKernels& solver = solver_kernels(kernels().name);
    nb::gil_scoped_release free;
    solve_rows(solver,
               SolveInputs{at<const float>(weights), at<const float>(upper), at<const float>(importance),
                           at<const uint8_t>(dead), rows, columns, outliers, group},
               SolveOptions{static_cast<LevelSearch>(levels), static_cast<Feedback>(feedback), bits, iterations,
                            symmetric, clip, feedback_outliers},
               SolveOutputs{at<uint8_t>(planes), at<uint16_t>(scales), at<int8_t>(level_codes), at<uint8_t>(zeros),
                            at<int8_t>(outlier_codes), at<uint16_t>(outlier_scales)},
               threads);
  });
  m.def("find_levels", [](uintptr_t block, uintptr_t importance, int64_t rows, int64_t width, int search, int bits,
                          int iterations, bool symmetric, float clip, uintptr_t integers, uintptr_t scales,
                          uintptr_t zeros, int threads) {
    nb::gil_scoped_release free;
    find_levels(LevelFinder(static_cast<LevelSearch>(search), bits, iterations, symmetric, clip), at<const float>(block),
                at<const float>(importance), rows, width, at<int8_t>(integers), at<uint16_t>(scales),
                at<uint8_t>(zeros), threads);
  });
  m.def("real_levels", [](uintptr_t block, uintptr_t importance, int64_t rows, int64_t width, int search, int bits,
                          int iterations, uintptr_t levels) {
    nb::gil_scoped_release free;
    LevelFinder finder(static_cast<LevelSearch>(search), bits, iterations);
    finder.importance(at<const float>(importance), width);
    for (int64_t row = 0; row < rows; ++row) {
      finder.real_levels(at<const float>(block) + row * width, at<float>(levels) + (row << bits));
    }
  });
  m.def("snap", [](uintptr_t levels, int64_t rows, int count, uintptr_t integers, uintptr_t scales) {
    for (int64_t row = 0; row < rows; ++row) {
      const GridRow grid = snap(at<const float>(levels) + row * count, count);
      for (int i = 0; i < count; ++i) at<int8_t>(integers)[row * count + i] = grid.integers[i];
      at<uint16_t>(scales)[row] = grid.scale;
    }
  });
  m.def("refine_block", [](uintptr_t target, uintptr_t square, int64_t rows, int64_t width, int count,
                           uintptr_t integers, uintptr_t scales, uintptr_t ranks, int threads) {
    const SolverKernels& solver = solver_kernels(kernels().name);
    nb::gil_scoped_release free;
    refine_block(solver, at<const float>(target), at<const float>(square), rows, width, count, at<int8_t>(integers),
                 at<uint16_t>(scales), at<uint8_t>(ranks), threads);
  });
  m.def("upper_factor", [](uintptr_t hessian, int64_t size, float shift, uintptr_t upper, int threads) {
    const SolverKernels& solver = solver_kernels(kernels().name);
    nb::gil_scoped_release free;
    return upper_factor(solver, at<const float>(hessian), size, shift, at<float>(upper), threads);
  });
}
