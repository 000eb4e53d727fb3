// Whole decoder blocks of the Llama family: what decoder.py composes call by call, in one call.
//
// Between two products everything of Python has left the caches, so a call of some microseconds takes several times as
// long there; with many blocks that is a tenth of a token's time.
#pragma once
#include "decoder.h"
#include "plane_linear.h"

namespace bitwright {

// The linears that share an input.
struct Site {
  const uint8_t* packed;
  Geometry geometry;
  const int32_t* order;  // [columns] or null
  const float* bias;     // [rows] or null
  float cut, share;          // of the quantizer: share for byte tiles alone
  int balance;               // of planes; -1: byte tiles
  int64_t hadamard, normal;  // size of the blocks, a power of two (0: none), and the channels that they fill
};

struct Norm {
  const float* weight;
  float eps;
};

struct DecoderBlock {
  Norm input, mlp, query, key;  // of queries and keys: a null weight where there is none
  Site attn_in, attn_out, mlp_in, mlp_out;
  int64_t query_heads, key_heads, head_dim, key_at, value_at, up_at, gated;  // columns of the sites' outputs
  int64_t window;
  float scale;
};

struct BlockCache {
  uint8_t *keys, *values;
  int64_t capacity;
  float cut;
};

// All kernels of a variant.
struct AllKernels {
  const Kernels& linear;
  const PlaneKernels& planes;
  const DecoderKernels& decoder;
};

// Floats of scratch that `run_blocks` needs for so many tokens.
int64_t block_scratch(const DecoderBlock& block, int64_t tokens);

// Blocks `first` to `last` of `blocks`. x [tokens][hidden] is the residual stream before and after; normed [tokens][hidden]
// is written: behind the norm of block `last`, or `final` behind the last of `count`. Where `first` is not 0, normed
// holds what an earlier call left. caches: of blocks first to last.
void run_blocks(const AllKernels&, const DecoderBlock* blocks, int64_t first, int64_t last, int64_t count, const Norm& final,
                float* x, float* normed, int64_t tokens, const float* cos, const float* sin, const BlockCache* caches,
                int bits, int64_t position, float* scratch, int threads);

}  // namespace bitwright
