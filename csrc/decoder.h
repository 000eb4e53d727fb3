// What a decoder block does beside its quantized linears: the quantized cache, attention over it, the Hadamard
// transform. Plain structs and functions, as in site.h.
#pragma once
#include "site.h"

namespace bitwright {

// Records of a quantized cache (docs/format.md, Run time), uint8 [heads][capacity][bytes()]: codes, then scale and
// minimum as fp16. Because four bytes follow the codes, they may be read in whole words of four.
struct Records {
  int64_t heads, capacity, head_dim;
  int bits;  // 2..8; code i stands from bit i * bits on, the lowest first

  BITWRIGHT_INLINE int64_t code_bytes() const { return (head_dim * bits + 7) / 8; }
  BITWRIGHT_INLINE int64_t bytes() const { return code_bytes() + 4; }
};

// Queries that attend to the last `length` tokens of a cache, of which the last `tokens` are their own positions.
//
// The queries of all heads that share a head of the cache are its rows, [tokens][group].
struct Attention {
  Records cache;
  const uint8_t *keys, *values;
  const float* queries;
  int64_t head_stride, token_stride;  // of `queries`, in floats
  int64_t group;                      // query heads that share a head of the cache
  int64_t tokens, length;
  int64_t window;  // tokens that a query sees, itself included; 0: all before it
  float scale;

  BITWRIGHT_INLINE int64_t rows() const { return tokens * group; }
  BITWRIGHT_INLINE const float* query(int64_t head, int64_t row) const {
    return queries + (head * group + row % group) * head_stride + row / group * token_stride;
  }
  BITWRIGHT_INLINE int64_t end_key(int64_t row) const { return length - tokens + row / group + 1; }
  BITWRIGHT_INLINE int64_t first_key(int64_t row) const {
    const int64_t end = end_key(row);
    return window > 0 && end > window ? end - window : 0;
  }
};

constexpr int64_t kRowBlock = 48;   // rows that are worked on together while a chunk of keys lies decoded
constexpr int64_t kKeyChunk = 64;   // keys that are worked on together
constexpr int64_t kSplitRows = 16;  // up to so many rows the context is split among threads,
constexpr int64_t kSplit = 512;     // into parts of so many keys

// A part of the work: rows of one head (at most kRowBlock) and the keys that at least one of them sees.
struct Span {
  int64_t head, first_row, rows, first_key, last_key;
};

// Softmax over the keys of a span before the division: sums [rows][head_dim] of exp(score - top) * value, and the
// `total` of exp(score - top), for each row.
struct Partial {
  float *sums, *top, *total;
};

// Floats of scratch that a thread of `attend` needs.
BITWRIGHT_INLINE int64_t attention_scratch(const Attention& a) {
  const int64_t width = round_up(a.cache.head_dim, 64);
  const int64_t spread = 2 * (kKeyChunk * (a.cache.head_dim + 4) / 4 + 8);  // of widths that are spread to bytes
  const int64_t blocked =
      2 * kRowBlock * width + kRowBlock * kKeyChunk + 2 * kKeyChunk * width + 8 * kKeyChunk + spread;
  return blocked > a.length ? blocked : a.length;
}

// Encodes states [tokens][head_dim] of one head, `stride` floats apart, into consecutive records. The codes span the
// range without the share `cut` at either end.
using AppendFunction = void(const float* states, int64_t stride, int64_t tokens, const Records&, float cut,
                            uint8_t* records);
AppendFunction append_scalar, append_avx2;

using AttendFunction = void(const Attention&, const Span&, float* scratch, const Partial&);
AttendFunction attend_scalar, attend_avx2;

// x [blocks][size] -> y, each block times the Sylvester matrix times `factor`; `size` is a power of two. All variants
// do the same float operations: x * factor first, then butterflies of distance 1, 2, 4, ...
using HadamardFunction = void(const float* x, float* y, int64_t blocks, int64_t size, float factor);
HadamardFunction hadamard_scalar, hadamard_avx2;

// A matrix of 1 and -1 [order][order] times values [order][stride], in place, `width` <= kSignedColumns columns at once.
//
// Four rows of values have only 16 signed sums. With all of them in a table (order / 4 of 16 x 16 floats), an output
// takes one addition for four values, and no multiplication. `signs` [order][order / 4] says which: 16 times the four
// bits, bit j set where the matrix has -1 at column 4 g + j. All variants do the same float operations: in a table
// (+-x0 +- x1) + (+-x2 +- x3); then the sum over the groups of four, in order.
constexpr int64_t kSignedColumns = 16;
using SignedSumsFunction = void(float* values, int64_t order, int64_t stride, int64_t width, const uint8_t* signs,
                                float* tables);
SignedSumsFunction signed_sums_scalar, signed_sums_avx2;

// y = silu(gate) * up, silu(v) = v / (1 + exp(-v)). Variants differ in the last bits of exp.
using GateFunction = void(const float* gate, const float* up, float* y, int64_t count);
GateFunction gate_scalar, gate_avx2;

// One instruction set's functions.
struct DecoderKernels {
  AppendFunction* append;
  AttendFunction* attend;
  HadamardFunction* hadamard;
  SignedSumsFunction* signed_sums;
  GateFunction* gate;
};

// Drivers that share the work among threads; results do not depend on `threads`.

// states [heads][tokens][head_dim] with strides in floats, encoded from token `position` of the records on.
void kv_append(const DecoderKernels&, const float* states, int64_t head_stride, int64_t token_stride, int64_t tokens,
               int64_t position, const Records&, float cut, uint8_t* records, int threads);

// y [tokens][heads * group][head_dim]
void kv_attention(const DecoderKernels&, const Attention&, float* y, int threads);

void hadamard(const DecoderKernels&, const float* x, float* y, int64_t blocks, int64_t size, float factor, int threads);

// x [tokens][columns] -> y, channels in site order (`order`, or null: as they are), the first `normal` of them times
// H / sqrt(size) block by block; `size` is a power of two. What is left of them in falling powers of two below `size`.
void site_hadamard(const DecoderKernels&, const float* x, const int32_t* order, float* y, int64_t tokens,
                   int64_t columns, int64_t normal, int64_t size, int threads);

// values [count][order][inner], each [order][inner] by the matrix of `signs`; order is a multiple of 4.
void signed_sums(const DecoderKernels&, float* values, int64_t count, int64_t order, int64_t inner,
                 const uint8_t* signs, int threads);

// x [tokens][columns], gate from its first column on, up from column `up` on -> y [tokens][size]
void gated(const DecoderKernels&, const float* x, int64_t tokens, int64_t columns, int64_t up, int64_t size, float* y,
           int threads);

// What attention is told of the projections of some tokens: x [tokens][columns] holds the queries of all heads from its
// first column on, keys and values of the cache's heads from `key` and `value` on, none of them rotated.
struct Projections {
  const float* x;
  int64_t tokens, columns, query_heads, key, value;
  const float *cos, *sin;  // [tokens][head_dim]
};

// Rotates queries and keys, appends keys and values from token `position` on, and attends: y [tokens][query_heads][head_dim]
void attention_step(const DecoderKernels&, const Projections&, const Records&, uint8_t* keys, uint8_t* values,
                    int64_t position, float cut, int64_t window, float scale, float* y, int threads);

// For these the compiler's own vectors are as fast as memory and call allow; there is one version.

// y = weight * s / sqrt(mean(s^2) + eps), for each row; s = x, or x + `add` where that is not null, written to `sum`.
void rms_norm(const float* x, const float* add, const float* weight, float eps, float* sum, float* y, int64_t rows,
              int64_t width, int threads);

// y = x * cos + (-second half, first half) * sin; x [tokens][heads][dim] with strides, cos and sin [tokens][dim]
void rope(const float* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, float* y,
          int64_t tokens, int64_t heads, int64_t dim, int threads);

}  // namespace bitwright
