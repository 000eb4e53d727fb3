#include "isa.h"

#include <cstring>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "activation/kernels.h"
#include "dense/kernels.h"
#include "head/kernels.h"
#include "peak/kernels.h"
#include "product/kernels.h"

namespace bitwright {

#ifdef BITWRIGHT_WITH_EMULATION
ProductFunction product_avx512_emulated;
#endif

namespace {

#if defined(__x86_64__)
// Single processor bits, not names of processors: Zen 4 and Ice Lake have what Sapphire Rapids has.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(__aarch64__)
bool has_neon_dot() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every 64-bit ARM processor that macOS runs on
#endif
}
#endif

constexpr DecoderKernels kDecoderScalar = {append_scalar, attend_scalar, hadamard_scalar, signed_sums_scalar, gate_scalar};
#if defined(__x86_64__)
constexpr DecoderKernels kDecoderAvx2 = {append_avx2, attend_avx2, hadamard_avx2, signed_sums_avx2, gate_avx2};
#endif

}  // namespace

const Variant* variants(int* count) {
  static const Variant all[] = {
#if defined(__x86_64__)
      {{"avx512", quantize_avx2, product_avx512, dense_avx2, head_avx2, peak_avx512}, has_avx512(), kDecoderAvx2},
      {{"avx2", quantize_avx2, product_avx2, dense_avx2, head_avx2, peak_avx2}, has_avx2(), kDecoderAvx2},
#endif
#if defined(__aarch64__)
      {{"neon", quantize_neon, product_neon, dense_neon, head_scalar, peak_neon}, has_neon_dot(), kDecoderScalar},
#endif
      {{"scalar", quantize_scalar, product_scalar, dense_scalar, head_scalar, nullptr}, true, kDecoderScalar},
#ifdef BITWRIGHT_WITH_EMULATION
      {{"avx512-emulated", quantize_scalar, product_avx512_emulated, dense_scalar, head_scalar, nullptr},
       true,
       kDecoderScalar},
#endif
  };
  *count = static_cast<int>(sizeof(all) / sizeof(all[0]));
  return all;
}

const Variant* find_variant(const char* name) {
  int count;
  const Variant* all = variants(&count);
  for (int i = 0; i < count; ++i) {
    if (name ? std::strcmp(all[i].kernels.name, name) == 0 : all[i].runs) return all + i;
  }
  return nullptr;
}

}  // namespace bitwright
