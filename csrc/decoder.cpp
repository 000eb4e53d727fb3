#include "decoder.h"

#include <cmath>
#include <memory>

#include "work.h"

namespace bitwright {

namespace {

thread_local Arena shared_arena, own_arena;

// No more threads than there is work for: a region costs some microseconds.
int threads_for(int threads, int64_t items, int64_t work) {
  constexpr int64_t kLeast = 1 << 16;  // multiplications or values that a thread is worth
  const int64_t count = smaller<int64_t>(smaller<int64_t>(threads, items), work / kLeast);
  return count < 1 ? 1 : static_cast<int>(count);
}

// One row of y from the partial sums over `parts` ranges of its keys, `stride` floats from one to the next.
void combine(const float* sums, const float* top, const float* total, int64_t parts, int64_t sums_stride,
             int64_t stride, int64_t head_dim, float* y) {
  float highest = top[0];
  for (int64_t i = 1; i < parts; ++i) highest = top[i * stride] > highest ? top[i * stride] : highest;
  float whole = 0.0f;
  for (int64_t c = 0; c < head_dim; ++c) y[c] = 0.0f;
  for (int64_t i = 0; i < parts; ++i) {
    if (total[i * stride] == 0.0f && parts > 1) continue;  // the window left nothing there
    const float weight = parts == 1 ? 1.0f : std::exp(top[i * stride] - highest);
    whole += weight * total[i * stride];
    const float* from = sums + i * sums_stride;
    for (int64_t c = 0; c < head_dim; ++c) y[c] += weight * from[c];
  }
  const float inverse = 1.0f / whole;
  for (int64_t c = 0; c < head_dim; ++c) y[c] *= inverse;
}

}  // namespace

void kv_append(const DecoderKernels& kernels, const float* states, int64_t head_stride, int64_t token_stride,
               int64_t tokens, int64_t position, const Records& r, float cut, uint8_t* records, int threads) {
  const int64_t items = r.heads * tokens;
  const int count = threads_for(threads, items, items * r.head_dim);
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = items * part / count, end = items * (part + 1) / count; i < end;) {
      const int64_t head = i / tokens, token = i % tokens, size = smaller(tokens - token, end - i);
      kernels.append(states + head * head_stride + token * token_stride, token_stride, size, r, cut,
                     records + (head * r.capacity + position + token) * r.bytes());
      i += size;
    }
  }
}

void kv_attention(const DecoderKernels& kernels, const Attention& a, float* y, int threads) {
  const int64_t heads = a.cache.heads, rows = a.rows(), dim = a.cache.head_dim;
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t seen = a.length - a.first_key(0);  // keys from the first that any row sees
  // How the work is cut depends on the call alone, never on the number of threads: so does the result.
  const int64_t parts = rows <= kSplitRows ? (seen + kSplit - 1) / kSplit : 1;
  const int64_t items = heads * blocks * parts;
  const int count = threads_for(threads, items, heads * rows * seen * dim);
  const int64_t span_rows = smaller(rows, kRowBlock), span_floats = span_rows * (dim + 2);
  const int64_t scratch = round_up(attention_scratch(a), 16);
  float* shared = parts > 1 ? reinterpret_cast<float*>(shared_arena.get(items * span_floats * 4)) : nullptr;
  const auto partial = [&](float* memory) {
    return Partial{memory, memory + span_rows * dim, memory + span_rows * (dim + 1)};
  };
  const auto output = [&](int64_t head, int64_t row) {
    return y + ((row / a.group * heads + head) * a.group + row % a.group) * dim;
  };
#pragma omp parallel num_threads(count) if (count > 1)
  {
    float* own = reinterpret_cast<float*>(own_arena.get((scratch + span_floats) * 4));
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      // The last rows see most keys: they come first, so that no thread is left with a long one at the end.
      const int64_t block = blocks - 1 - item / (heads * parts), head = item / parts % heads, part = item % parts;
      Span s;
      s.head = head;
      s.first_row = block * kRowBlock;
      s.rows = smaller(kRowBlock, rows - s.first_row);
      s.first_key = a.first_key(s.first_row) + part * kSplit;
      s.last_key = a.end_key(s.first_row + s.rows - 1);
      if (parts > 1) s.last_key = smaller(s.last_key, s.first_key + kSplit);
      const Partial p = partial(parts > 1 ? shared + item * span_floats : own + scratch);
      kernels.attend(a, s, own, p);
      if (parts > 1) continue;
      for (int64_t i = 0; i < s.rows; ++i) {
        combine(p.sums + i * dim, p.top + i, p.total + i, 1, 0, 0, dim, output(head, s.first_row + i));
      }
    }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * rows; ++i) {
        const int64_t head = i / rows, row = i % rows;
        const Partial p = partial(shared + head * parts * span_floats);
        combine(p.sums + row * dim, p.top + row, p.total + row, parts, span_floats, span_floats, dim,
                output(head, row));
      }
    }
  }
}

void hadamard(const DecoderKernels& kernels, const float* x, float* y, int64_t blocks, int64_t size, float factor,
              int threads) {
  const int count = threads_for(threads, blocks, blocks * size);
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
  for (int64_t part = 0; part < count; ++part) {
    const int64_t first = blocks * part / count, last = blocks * (part + 1) / count;
    kernels.hadamard(x + first * size, y + first * size, last - first, size, factor);
  }
}

void site_hadamard(const DecoderKernels& kernels, const float* x, const int32_t* order, float* y, int64_t tokens,
                   int64_t columns, int64_t normal, int64_t size, int threads) {
  const int count = threads_for(threads, tokens, tokens * columns);
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    const float* from = x + token * columns;
    float* to = y + token * columns;
    for (int64_t i = 0; i < columns; ++i) to[i] = from[order ? order[i] : i];
    int64_t left = normal;
    for (int64_t block = size; block > 1 && left > 1; block /= 2) {
      const int64_t blocks = left / block;
      if (blocks) kernels.hadamard(to, to, blocks, block, static_cast<float>(1.0 / std::sqrt(double(block))));
      to += blocks * block;
      left -= blocks * block;
    }
  }
}

void signed_sums(const DecoderKernels& kernels, float* values, int64_t count, int64_t order, int64_t inner,
                 const uint8_t* signs, int threads) {
  const int64_t chunks = (inner + kSignedColumns - 1) / kSignedColumns, items = count * chunks;
  const int used = threads_for(threads, items, count * inner * order * order / 4);
#pragma omp parallel num_threads(used) if (used > 1)
  {
    float* tables = reinterpret_cast<float*>(own_arena.get(order * 4 * kSignedColumns * 4));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t column = item % chunks * kSignedColumns;
      kernels.signed_sums(values + item / chunks * order * inner + column, order, inner,
                          smaller(kSignedColumns, inner - column), signs, tables);
    }
  }
}

void gated(const DecoderKernels& kernels, const float* x, int64_t tokens, int64_t columns, int64_t up, int64_t size,
           float* y, int threads) {
  constexpr int64_t kPart = 2048;
  const int64_t parts = (size + kPart - 1) / kPart, items = tokens * parts;
  const int count = threads_for(threads, items, items * kPart * 8);  // an exponential is worth that many products
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t token = item / parts, first = item % parts * kPart;
    const float* from = x + token * columns + first;
    kernels.gate(from, from + up, y + token * size + first, smaller(kPart, size - first));
  }
}

void attention_step(const DecoderKernels& kernels, const Projections& p, const Records& r, uint8_t* keys,
                    uint8_t* values, int64_t position, float cut, int64_t window, float scale, float* y, int threads) {
  const int64_t dim = r.head_dim, query_width = p.query_heads * dim, key_width = r.heads * dim;
  const std::unique_ptr<float[]> rotated(new float[static_cast<size_t>(p.tokens * (query_width + key_width))]);
  float *queries = rotated.get(), *fresh = queries + p.tokens * query_width;
  rope(p.x, p.columns, dim, p.cos, p.sin, queries, p.tokens, p.query_heads, dim, threads);
  rope(p.x + p.key, p.columns, dim, p.cos, p.sin, fresh, p.tokens, r.heads, dim, threads);
  kv_append(kernels, fresh, dim, key_width, p.tokens, position, r, cut, keys, threads);
  kv_append(kernels, p.x + p.value, dim, p.columns, p.tokens, position, r, cut, values, threads);
  const Attention a{r,   keys,        values, queries, dim, query_width, p.query_heads / r.heads, p.tokens,
                    position + p.tokens, window, scale};
  kv_attention(kernels, a, y, threads);
}

void rms_norm(const float* x, const float* add, const float* weight, float eps, float* sum, float* y, int64_t rows,
              int64_t width, int threads) {
  constexpr int64_t kLanes = 16;  // independent sums, for the compiler's vectors
  const int count = threads_for(threads, rows, rows * width);
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * width;
    float* to = y + row * width;
    if (add) {
      for (int64_t i = 0; i < width; ++i) sum[row * width + i] = from[i] + add[row * width + i];
      from = sum + row * width;
    }
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += from[i + k] * from[i + k];
    }
    float squares = 0.0f;
    for (; i < width; ++i) squares += from[i] * from[i];
    for (int64_t k = 0; k < kLanes; ++k) squares += lanes[k];
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (int64_t k = 0; k < width; ++k) to[k] = weight[k] * (from[k] * factor);
  }
}

void rope(const float* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, float* y,
          int64_t tokens, int64_t heads, int64_t dim, int threads) {
  const int count = threads_for(threads, tokens, tokens * heads * dim);
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(count) schedule(static) if (count > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    const float *c = cos + token * dim, *s = sin + token * dim;
    for (int64_t head = 0; head < heads; ++head) {
      const float* from = x + token * token_stride + head * head_stride;
      float* to = y + (token * heads + head) * dim;
      for (int64_t i = 0; i < half; ++i) to[i] = from[i] * c[i] - from[half + i] * s[i];
      for (int64_t i = half; i < dim; ++i) to[i] = from[i] * c[i] + from[i - half] * s[i];
    }
  }
}

}  // namespace bitwright
