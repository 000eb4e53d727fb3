#include "linear.h"

#include "head/kernels.h"
#include "work.h"

namespace bitwright {

namespace {

Activations lay_out(Parts& parts, const Geometry& g, int bits, int64_t tokens) {
  const int64_t records = g.groups() * tokens;
  Activations a;
  a.tokens = tokens;
  a.codes = parts.take<int8_t>(bits <= kByteBits ? records * g.width() : 0);
  a.words = bits <= kByteBits ? nullptr : parts.take<int16_t>(records * g.width());
  a.step = parts.take<float>(records);
  a.rest = parts.take<float>(records);
  a.shift = parts.take<int32_t>(records);
  take_outliers(parts, g, a);
  return a;
}

}  // namespace

void site_linear(const Kernels& kernels, const float* x, int64_t tokens, const uint8_t* packed, const Geometry& g,
                 const Quantizer& q, const float* bias, float* y, int threads) {
  const Activations a = in_shared_memory([&](Parts& parts) { return lay_out(parts, g, q.bits, tokens); });
  quantize_and_multiply(kernels, x, packed, g, q, a, product_scratch(g, a), bias, y, threads);
}

void quantize_site(const Kernels& kernels, const float* x, const Geometry& g, const Quantizer& q,
                   const Activations& out, int threads) {
  if (out.tokens == 0) return;
  const int count = static_cast<int>(smaller<int64_t>(threads, out.tokens));
#pragma omp parallel num_threads(count)
  {
    const int me = this_thread(), team = team_size();
    float* own = reinterpret_cast<float*>(own_memory(g.columns * 4));
    kernels.quantize(x, g, q, out, own, out.tokens * me / team, out.tokens * (me + 1) / team);
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

void head_linear(const Kernels& kernels, const HeadRows& weights, const float* x, int64_t tokens, float* y,
                 int threads) {
  constexpr int64_t kRows = 32;  // handed out together: with many tokens their codes stay in the cache
  const int64_t parts = (weights.rows + kRows - 1) / kRows;
  const int count = useful_threads(threads, parts, tokens);
#pragma omp parallel for schedule(dynamic, 2) num_threads(count)
  for (int64_t part = 0; part < parts; ++part) {
    kernels.head(weights, x, tokens, y, part * kRows, smaller(weights.rows, (part + 1) * kRows));
  }
}

}  // namespace bitwright
