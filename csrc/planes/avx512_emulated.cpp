// avx512.cpp on SIMDe: slow, and the same arithmetic on any machine.
#define BITWRIGHT_EMULATED
#include "avx512.cpp"
