#include "blocks.h"

#include "linear.h"

namespace bitwright {

namespace {

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// y [tokens][rows] = the site's products with x [tokens][columns]; `turned` has room for another x.
void multiply(const AllKernels& kernels, const Site& s, const float* x, int64_t tokens, float* turned, float* y,
              int threads) {
  const int32_t* order = s.order;
  if (s.hadamard) {
    site_hadamard(kernels.decoder, x, order, turned, tokens, s.geometry.columns, s.normal, s.hadamard, threads);
    x = turned;
    order = nullptr;
  }
  if (s.balance < 0) {
    site_linear(kernels.linear, x, tokens, s.packed, s.geometry, Quantizer{order, s.cut, 4, s.share}, s.bias, y, threads);
  } else {
    site_planes(kernels.planes, x, tokens, s.packed, s.geometry,
                PlaneQuantizer{order, s.cut, static_cast<Balance>(s.balance)}, s.bias, y, threads);
  }
}

// The norm of each head of some tokens, in place; `heads` heads stand in the columns from x on, of `columns` a token.
void norm_heads(const Norm& norm, float* x, int64_t tokens, int64_t columns, int64_t heads, int64_t dim, int threads) {
  if (!norm.weight) return;
  for (int64_t token = 0; token < tokens; ++token) {
    float* row = x + token * columns;
    rms_norm(row, nullptr, norm.weight, norm.eps, nullptr, row, heads, dim, threads);
  }
}

}  // namespace

int64_t block_scratch(const DecoderBlock& b, int64_t tokens) {
  const int64_t made = larger(b.attn_in.geometry.rows, b.mlp_in.geometry.rows);
  const int64_t inner = larger(b.query_heads * b.head_dim, b.gated), hidden = b.attn_in.geometry.columns;
  return tokens * (made + inner + hidden + larger(hidden, inner));
}

void run_blocks(const AllKernels& kernels, const DecoderBlock* blocks, int64_t first, int64_t last, int64_t count,
                const Norm& final, float* x, float* normed, int64_t tokens, const float* cos, const float* sin,
                const BlockCache* caches, int bits, int64_t position, float* scratch, int threads) {
  for (int64_t index = first; index < last; ++index) {
    const DecoderBlock& b = blocks[index];
    const BlockCache& cache = caches[index - first];
    const int64_t hidden = b.attn_in.geometry.columns, columns = b.attn_in.geometry.rows, dim = b.head_dim;
    float* made = scratch;
    float* inner = made + tokens * larger(columns, b.mlp_in.geometry.rows);
    float* out = inner + tokens * larger(b.query_heads * dim, b.gated);
    float* turned = out + tokens * hidden;
    if (index == 0) rms_norm(x, nullptr, b.input.weight, b.input.eps, nullptr, normed, tokens, hidden, threads);

    multiply(kernels, b.attn_in, normed, tokens, turned, made, threads);
    norm_heads(b.query, made, tokens, columns, b.query_heads, dim, threads);
    norm_heads(b.key, made + b.key_at, tokens, columns, b.key_heads, dim, threads);
    const Projections projections{made, tokens, columns, b.query_heads, b.key_at, b.value_at, cos, sin};
    attention_step(kernels.decoder, projections, Records{b.key_heads, cache.capacity, dim, bits}, cache.keys,
                   cache.values, position, cache.cut, b.window, b.scale, inner, threads);
    multiply(kernels, b.attn_out, inner, tokens, turned, out, threads);
    rms_norm(x, out, b.mlp.weight, b.mlp.eps, x, normed, tokens, hidden, threads);

    multiply(kernels, b.mlp_in, normed, tokens, turned, made, threads);
    gated(kernels.decoder, made, tokens, b.mlp_in.geometry.rows, b.up_at, b.gated, inner, threads);
    multiply(kernels, b.mlp_out, inner, tokens, turned, out, threads);
    const Norm& following = index + 1 < count ? blocks[index + 1].input : final;
    rms_norm(x, out, following.weight, following.eps, x, normed, tokens, hidden, threads);
  }
}

}  // namespace bitwright
