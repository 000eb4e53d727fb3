#include "linear.h"

#include "work.h"

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
