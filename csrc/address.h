// Python hands addresses over as integers.
#pragma once
#include <cstdint>

namespace bitwright {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace bitwright
