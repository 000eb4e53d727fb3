#include "read.h"

namespace bitwright {

uint64_t read_memory(const uint64_t* words, int64_t count, int threads) {
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}

}  // namespace bitwright
