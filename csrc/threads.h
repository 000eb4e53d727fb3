// What every parallel driver needs: memory that a thread keeps, and its number.
#pragma once
#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "site.h"

namespace bitwright {

// Memory that a thread keeps between calls: a decode step would spend more time in malloc and page faults than here.
class Arena {
 public:
  ~Arena() { std::free(memory_); }

  uint8_t* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = round_up(bytes + bytes / 4, 4096);
      memory_ = static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(size_)));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace bitwright
