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

// A thread's scratch, for as long as it works on one call.
inline uint8_t* own_memory(int64_t bytes) {
  static thread_local Arena arena;
  return arena.get(bytes);
}

// Hands out parts of one piece of memory, each at a multiple of 64 bytes. Without memory: only counts.
class Parts {
 public:
  explicit Parts(uint8_t* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    uint8_t* place = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(place);
  }

  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* memory_;
  int64_t bytes_ = 0;
};

// Memory that all threads of a call see, laid out by `lay_out(Parts&)`; it is valid until the next call.
template <typename LayOut>
auto in_shared_memory(const LayOut& lay_out) {
  static thread_local Arena arena;
  Parts counted(nullptr);
  lay_out(counted);
  Parts parts(arena.get(counted.bytes()));
  return lay_out(parts);
}

inline void take_outliers(Parts& parts, const Geometry& g, Activations& a) {
  a.outliers = parts.take<int8_t>(a.tokens * g.outlier_width());
  a.outlier_step = parts.take<float>(a.tokens);
  a.outlier_shift = parts.take<int32_t>(a.tokens);
}

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

// Threads of the region that this is called in. They may be fewer than were asked for: OMP_THREAD_LIMIT and OMP_DYNAMIC,
// a region inside another one, a build without OpenMP. Who shares out work by thread asks here, inside.
inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// No more threads than there is work for: a region costs some microseconds.
inline int useful_threads(int threads, int64_t tiles, int64_t tokens) {
  const int64_t work = (tiles * tokens + 7) / 8;
  int64_t count = smaller<int64_t>(threads, smaller(tiles, work));
  count = smaller<int64_t>(count, Tiles::kMost);
  return count < 1 ? 1 : static_cast<int>(count);
}

// y = W x + bias of a site, by either kind of kernels: each thread quantizes some of the tokens into `inputs`, then all
// multiply tile by tile. `scratch`: bytes that a thread of the product needs.
template <typename AnyKernels, typename AnyQuantizer, typename Inputs>
void quantize_and_multiply(const AnyKernels& kernels, const float* x, const uint8_t* packed, const Geometry& g,
                           const AnyQuantizer& q, const Inputs& inputs, int64_t scratch, const float* bias, float* y,
                           int threads) {
  const int64_t tokens = inputs.tokens, gathered = round_up(g.columns * 4, 64);
  const int count = useful_threads(threads, g.tiles(), tokens);
  if (count == 1) {
    uint8_t* own = own_memory(gathered + scratch);
    kernels.quantize(x, g, q, inputs, reinterpret_cast<float*>(own), 0, tokens);
    kernels.product(packed, g, inputs, bias, y, own + gathered, 0, g.tiles());
    return;
  }
  Tiles tiles(g.tiles(), count);
#pragma omp parallel num_threads(count)
  {
    uint8_t* own = own_memory(gathered + scratch);
    const int me = this_thread(), team = team_size();
    // Shares are rounded up, so that a single token is the first thread's: it is there before the others wake.
    const auto share = [&](int thread) { return (tokens * thread + team - 1) / team; };
    kernels.quantize(x, g, q, inputs, reinterpret_cast<float*>(own), share(me), share(me + 1));
#pragma omp barrier
    int64_t first_tile, last_tile;
    while (tiles.take(me, &first_tile, &last_tile)) {
      kernels.product(packed, g, inputs, bias, y, own + gathered, first_tile, last_tile);
    }
  }
}

}  // namespace bitwright
