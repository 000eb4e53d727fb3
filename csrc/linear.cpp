#include "linear.h"

#include <atomic>

#include "threads.h"

namespace bitwright {

namespace {

thread_local Arena shared_arena, own_arena;

Activations lay_out(uint8_t* memory, const Geometry& g, int64_t tokens, int64_t* bytes) {
  int64_t at = 0;
  const auto take = [&](int64_t size) {
    uint8_t* place = memory + at;
    at += round_up(size, 64);
    return place;
  };
  Activations a;
  const int64_t records = g.groups() * tokens;
  a.tokens = tokens;
  a.codes = reinterpret_cast<int8_t*>(take(records * g.width()));
  a.step = reinterpret_cast<float*>(take(records * 4));
  a.rest = reinterpret_cast<float*>(take(records * 4));
  a.shift = reinterpret_cast<int32_t*>(take(records * 4));
  a.outliers = reinterpret_cast<int8_t*>(take(tokens * g.outlier_width()));
  a.outlier_step = reinterpret_cast<float*>(take(tokens * 4));
  a.outlier_shift = reinterpret_cast<int32_t*>(take(tokens * 4));
  *bytes = at;
  return a;
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

// No more threads than there is work for: a region costs some microseconds.
int useful_threads(int threads, int64_t tiles, int64_t tokens) {
  const int64_t work = (tiles * tokens + 7) / 8;
  int64_t count = smaller<int64_t>(threads, smaller(tiles, work));
  count = smaller<int64_t>(count, Tiles::kMost);
  return count < 1 ? 1 : static_cast<int>(count);
}

}  // namespace

void site_linear(const Kernels& kernels, const float* x, int64_t tokens, const uint8_t* packed, const Geometry& g,
                 const Quantizer& q, const float* bias, float* y, int threads) {
  int64_t bytes;
  lay_out(nullptr, g, tokens, &bytes);
  const Activations a = lay_out(shared_arena.get(bytes), g, tokens, &bytes);
  const int64_t gathered = round_up(g.columns * 4, 64);
  const int count = useful_threads(threads, g.tiles(), tokens);
  if (count == 1) {
    uint8_t* own = own_arena.get(gathered + product_scratch(g));
    kernels.quantize(x, g, q, a, reinterpret_cast<float*>(own), 0, tokens);
    kernels.product(packed, g, a, bias, y, own + gathered, 0, g.tiles());
    return;
  }
  Tiles tiles(g.tiles(), count);
#pragma omp parallel num_threads(count)
  {
    uint8_t* own = own_arena.get(gathered + product_scratch(g));
    const int me = this_thread();
    if (tokens == 1) {
      if (me == 0) kernels.quantize(x, g, q, a, reinterpret_cast<float*>(own), 0, 1);
    } else {
      kernels.quantize(x, g, q, a, reinterpret_cast<float*>(own), tokens * me / count, tokens * (me + 1) / count);
    }
#pragma omp barrier
    int64_t first, last;
    while (tiles.take(me, &first, &last)) kernels.product(packed, g, a, bias, y, own + gathered, first, last);
  }
}

void quantize_site(const Kernels& kernels, const float* x, const Geometry& g, const Quantizer& q,
                   const Activations& out, int threads) {
  const int count = static_cast<int>(smaller<int64_t>(threads, out.tokens));
#pragma omp parallel num_threads(count)
  {
    const int me = this_thread();
    float* own = reinterpret_cast<float*>(own_arena.get(g.columns * 4));
    kernels.quantize(x, g, q, out, own, out.tokens * me / count, out.tokens * (me + 1) / count);
  }
}

void dense_linear(const Kernels& kernels, const float* x, int64_t tokens, const uint16_t* weights, int64_t rows,
                  int64_t columns, float* y, int threads) {
  constexpr int64_t kRows = 16;  // handed out together
  const int64_t parts = (rows + kRows - 1) / kRows;
  const int count = useful_threads(threads, parts, tokens);
#pragma omp parallel for schedule(static) num_threads(count)
  for (int64_t part = 0; part < parts; ++part) {
    kernels.dense(x, tokens, weights, rows, columns, y, part * kRows, smaller(rows, (part + 1) * kRows));
  }
}

}  // namespace bitwright
