// What one call of the quantized linear works on. Plain structs: no torch, no Python, no instruction set.
//
// Words as in docs/format.md: a site's input channels stand in site order, normal channels first, in groups; the last
// `outliers` are int8. The layout of packed weights is explained in docs/kernels.md.
#pragma once
#include <cstddef>
#include <cstdint>

// Always inline: each kernel file is compiled for its own instruction set, and of a function that several of them emit
// the linker keeps one copy, perhaps one that this processor cannot run.
#define BITWRIGHT_INLINE inline __attribute__((always_inline))

namespace bitwright {

constexpr int64_t kTileRows = 32;  // rows that are worked on together; the last tile is filled up with zero rows
constexpr int64_t kStep = 16;      // channels of a row in one 64-byte line of codes

template <typename T>
BITWRIGHT_INLINE T smaller(T a, T b) { return a < b ? a : b; }

BITWRIGHT_INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Sizes of a site's weights. `rows` counts the outputs of all linears of the site together.
struct Geometry {
  int64_t rows, columns, outliers, group;

  BITWRIGHT_INLINE int64_t normal() const { return columns - outliers; }
  BITWRIGHT_INLINE int64_t groups() const { return (normal() + group - 1) / group; }
  BITWRIGHT_INLINE int64_t channels(int64_t index) const {  // of one group: the last may be shorter
    const int64_t left = normal() - index * group;
    return left < group ? left : group;
  }
  BITWRIGHT_INLINE int64_t width() const { return round_up(group, kStep); }           // of a group as stored
  BITWRIGHT_INLINE int64_t outlier_width() const { return round_up(outliers, 4); }    // as stored
  BITWRIGHT_INLINE int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
};

// Offsets in bytes inside one tile of packed weights: for each group levels, scales, codes; then the outliers.
struct TileLayout {
  static constexpr int64_t kLevels = 0, kScales = 128, kCodes = 192;
  int64_t group_bytes, outliers_at, outlier_scales_at, bytes;

  BITWRIGHT_INLINE explicit TileLayout(const Geometry& g)
      : group_bytes(kCodes + g.width() / kStep * 128),
        outliers_at(g.groups() * group_bytes),
        outlier_scales_at(outliers_at + g.outlier_width() / 4 * 128),
        bytes(outlier_scales_at + kTileRows * 4) {}
};

// Quantized inputs of some tokens. A normal value is step * (code + rest), an outlier value outlier_step * code.
//
// `codes` holds c - z as int8, z clamped to 0..15; `rest` is what the clamp took off, nearly always 0. Because weights
// are stored with 128 added, every sum over weights is 128 * sum(codes) too large: `shift` is what takes that off.
struct Activations {
  int64_t tokens;
  int8_t* codes;          // [groups][tokens][width]
  float* step;            // [groups][tokens]
  float* rest;            // [groups][tokens]
  int32_t* shift;         // [groups][tokens]
  int8_t* outliers;       // [tokens][outlier_width]
  float* outlier_step;    // [tokens]
  int32_t* outlier_shift; // [tokens]
};

struct Quantizer {
  const int32_t* order;  // [columns], or null: channels are in site order already
  float cut;             // share of the range taken off at each end
  int bits;
};

// One instruction set's functions. Each works on a range, so that any way of sharing work can drive it.
struct Kernels {
  const char* name;
  // tokens first..last of x [tokens][columns]
  void (*quantize)(const float* x, const Geometry&, const Quantizer&, const Activations&, float* scratch,
                   int64_t first, int64_t last);
  // tiles first..last of y [tokens][rows]; bias [rows] or null; scratch: product_scratch bytes, 64-byte aligned
  void (*product)(const uint8_t* weights, const Geometry&, const Activations&, const float* bias, float* y,
                  uint8_t* scratch, int64_t first, int64_t last);
  // rows first..last of y [tokens][rows]; weights bfloat16 [rows][columns]
  void (*dense)(const float* x, int64_t tokens, const uint16_t* weights, int64_t rows, int64_t columns, float* y,
                int64_t first, int64_t last);
};

// Tokens that are worked on together while a group of weights lies decoded in the cache.
constexpr int64_t kTokenBlock = 96;

// Bytes of scratch that a thread of the product needs: one group of decoded weights, integer and float sums of a tile.
BITWRIGHT_INLINE int64_t product_scratch(const Geometry& g) { return kTileRows * g.width() + kTokenBlock * kTileRows * 8; }

// Sum of a row's levels over the true channels of a group: needed only where `rest` is not 0.
int32_t level_sum(const uint8_t* group, int64_t row, int64_t channels);

float half_to_float(uint16_t half);

}  // namespace bitwright
