#include "plane_linear.h"

#include <cstring>

#include "work.h"
#include "planes/kernels.h"

namespace bitwright {

namespace {

#if defined(__x86_64__)
// Single processor bits, as in ../isa.cpp. vpopcntb came later than the byte kernels' VNNI.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bitalg");
}
#endif

struct PlaneVariant {
  PlaneKernels kernels;
  bool runs;
};

PlaneActivations lay_out(Parts& parts, const Geometry& g, int64_t tokens) {
  const PlaneLayout layout(g);
  const int64_t records = g.groups() * tokens;
  PlaneActivations a;
  a.tokens = a.outliers.tokens = tokens;
  a.words = parts.take<uint16_t>(records * layout.lines * 2);
  a.ones = parts.take<uint8_t>(records * layout.parts * kPlanes);
  a.scales = parts.take<float>(records * kPlanes);
  a.offset = parts.take<float>(records);
  take_outliers(parts, g, a.outliers);
  return a;
}

}  // namespace

const PlaneKernels& plane_kernels(const char* variant) {
  static const PlaneVariant all[] = {
#if defined(__x86_64__)
      {{"avx512", quantize_planes_avx2, planes_avx512}, has_avx512()},
      {{"avx2", quantize_planes_avx2, planes_avx2}, has_avx2()},
#endif
      {{"scalar", quantize_planes_scalar, planes_scalar}, true},
#ifdef BITWRIGHT_WITH_EMULATION
      {{"avx512-emulated", quantize_planes_scalar, planes_avx512_emulated}, true},
#endif
  };
  const PlaneKernels* best = nullptr;
  for (const PlaneVariant& one : all) {
    if (!one.runs) continue;
    if (std::strcmp(one.kernels.name, variant) == 0) return one.kernels;
    if (!best) best = &one.kernels;
  }
  return *best;
}

void site_planes(const PlaneKernels& kernels, const float* x, int64_t tokens, const uint8_t* packed, const Geometry& g,
                 const PlaneQuantizer& q, const float* bias, float* y, int threads) {
  const PlaneActivations a = in_shared_memory([&](Parts& parts) { return lay_out(parts, g, tokens); });
  quantize_and_multiply(kernels, x, packed, g, q, a, plane_scratch(g), bias, y, threads);
}

void quantize_planes(const PlaneKernels& kernels, const float* x, const Geometry& g, const PlaneQuantizer& q,
                     const PlaneActivations& out) {
  float* own = reinterpret_cast<float*>(own_memory(g.columns * 4));
  kernels.quantize(x, g, q, out, own, 0, out.tokens);
}

}  // namespace bitwright
