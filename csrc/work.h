// How the linears share work among threads. For files without an instruction set of their own.
#pragma once
#include <atomic>
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

// A thread's own tiles first, in ascending memory order; then what is left of the others', from their far ends.
class Tiles {
 public:
  static constexpr int kMost = 256;

  Tiles(int64_t tiles, int threads) : threads_(threads) {
    for (int i = 0; i < threads; ++i) {
      parts_[i].range.store(pack(tiles * i / threads, tiles * (i + 1) / threads), std::memory_order_relaxed);
    }
  }

  // The next tiles of thread `me`; false when all are taken.
  bool take(int me, int64_t* first, int64_t* last) {
    constexpr int64_t kOwn = 4, kStolen = 2;
    if (from(parts_[me].range, kOwn, true, first, last)) return true;
    for (int i = 1; i < threads_; ++i) {
      if (from(parts_[(me + i) % threads_].range, kStolen, false, first, last)) return true;
    }
    return false;
  }

 private:
  struct alignas(64) Part {
    std::atomic<uint64_t> range;
  };

  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  static bool from(std::atomic<uint64_t>& range, int64_t count, bool front, int64_t* first, int64_t* last) {
    uint64_t seen = range.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = static_cast<int64_t>(seen >> 32), end = static_cast<int64_t>(seen & 0xffffffffu);
      if (begin >= end) return false;
      const int64_t size = smaller(count, end - begin);
      const uint64_t rest = front ? pack(begin + size, end) : pack(begin, end - size);
      if (!range.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) continue;
      *first = front ? begin : end - size;
      *last = *first + size;
      return true;
    }
  }

  Part parts_[kMost];
  int threads_;
};

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// No more threads than there is work for: a region costs some microseconds.
inline int useful_threads(int threads, int64_t tiles, int64_t tokens) {
  const int64_t work = (tiles * tokens + 7) / 8;
  int64_t count = smaller<int64_t>(threads, smaller(tiles, work));
  count = smaller<int64_t>(count, Tiles::kMost);
  return count < 1 ? 1 : static_cast<int>(count);
}

}  // namespace bitwright
