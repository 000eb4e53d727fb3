// Aligned memory that frees itself.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../site.h"

namespace bitwright {

struct Release {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Array = std::unique_ptr<T[], Release>;

// Not initialised, at an address that 64 divides.
template <typename T>
Array<T> make_array(int64_t size) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>(round_up(size * static_cast<int64_t>(sizeof(T)) + 1, 64)));
  if (!memory) throw std::bad_alloc();
  return Array<T>(static_cast<T*>(memory));
}

}  // namespace bitwright
