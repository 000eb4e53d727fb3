#include "plane_linear.h"

#include <cstring>

#include "work.h"
#include "planes/kernels.h"

namespace bitwright {

namespace {

thread_local Arena shared_arena, own_arena;

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

PlaneActivations lay_out(uint8_t* memory, const Geometry& g, int64_t tokens, int64_t* bytes) {
  int64_t at = 0;
  const auto take = [&](int64_t size) {
    uint8_t* place = memory + at;
    at += round_up(size, 64);
    return place;
  };
  const PlaneLayout layout(g);
  const int64_t records = g.groups() * tokens;
  PlaneActivations a;
  a.tokens = a.outliers.tokens = tokens;
  a.words = reinterpret_cast<uint16_t*>(take(records * layout.lines * 4));
  a.ones = take(records * layout.parts * kPlanes);
  a.scales = reinterpret_cast<float*>(take(records * kPlanes * 4));
  a.offset = reinterpret_cast<float*>(take(records * 4));
  a.outliers.outliers = reinterpret_cast<int8_t*>(take(tokens * g.outlier_width()));
  a.outliers.outlier_step = reinterpret_cast<float*>(take(tokens * 4));
  a.outliers.outlier_shift = reinterpret_cast<int32_t*>(take(tokens * 4));
  *bytes = at;
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
  int64_t bytes;
  lay_out(nullptr, g, tokens, &bytes);
  const PlaneActivations a = lay_out(shared_arena.get(bytes), g, tokens, &bytes);
  const int64_t gathered = round_up(g.columns * 4, 64);
  const int count = useful_threads(threads, g.tiles(), tokens);
  if (count == 1) {
    uint8_t* own = own_arena.get(gathered + plane_scratch(g));
    kernels.quantize(x, g, q, a, reinterpret_cast<float*>(own), 0, tokens);
    kernels.product(packed, g, a, bias, y, own + gathered, 0, g.tiles());
    return;
  }
  Tiles tiles(g.tiles(), count);
#pragma omp parallel num_threads(count)
  {
    uint8_t* own = own_arena.get(gathered + plane_scratch(g));
    const int me = this_thread();
    kernels.quantize(x, g, q, a, reinterpret_cast<float*>(own), tokens * me / count, tokens * (me + 1) / count);
#pragma omp barrier
    int64_t first, last;
    while (tiles.take(me, &first, &last)) kernels.product(packed, g, a, bias, y, own + gathered, first, last);
  }
}

void quantize_planes(const PlaneKernels& kernels, const float* x, const Geometry& g, const PlaneQuantizer& q,
                     const PlaneActivations& out) {
  float* own = reinterpret_cast<float*>(own_arena.get(g.columns * 4));
  kernels.quantize(x, g, q, out, own, 0, out.tokens);
}

}  // namespace bitwright
