// How fast memory can be read: what a product that reads each weight once is measured against.
#pragma once
#include <cstdint>

namespace bitwright {

// Reads all bytes in ascending order, each thread its own part; gives their sum as words, so that nothing is left out.
uint64_t read_memory(const uint64_t* words, int64_t count, int threads);

}  // namespace bitwright
