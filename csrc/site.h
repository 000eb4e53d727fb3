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
constexpr int64_t kStep = 64;      // channels of a row whose codes share 16 bytes

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

// Rows of a tile stand in slots: 4 x 4 transposed inside each sixteen. Vectors that hold slots 0 to 3, 4 to 7, ... then
// reduce to sums in row order by additions inside lanes alone.
BITWRIGHT_INLINE int64_t slot_of(int64_t row) { return (row & 16) | (row & 3) << 2 | ((row >> 2) & 3); }

// Offsets in bytes inside one tile of packed weights: for each group levels, scales, codes; then the outliers. Levels
// stand by slot, codes in lines of four slots and 64 channels, all lines of the same slots one after the other.
struct TileLayout {
  static constexpr int64_t kLevels = 0, kScales = 128, kCodes = 192;
  int64_t group_bytes, outliers_at, outlier_scales_at, bytes;

  BITWRIGHT_INLINE explicit TileLayout(const Geometry& g)
      : group_bytes(kCodes + g.width() / kStep * kTileRows * 16),
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
  float share;  // not 0: no zero point, the codes span this share of -max..max of the magnitudes (Atom)
};

struct HeadRows;  // head/kernels.h

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
  // rows first..last of y [tokens][rows]; weights of 8- or 4-bit integers (head/kernels.h)
  void (*head)(const HeadRows&, const float* x, int64_t tokens, float* y, int64_t first, int64_t last);
  // multiply-adds of `rounds` rounds of the product's arithmetic on registers alone (peak/kernels.h), or null
  int64_t (*peak)(int64_t rounds);
};

// Tokens that are worked on together while a group of weights lies decoded in the cache.
constexpr int64_t kTokenBlock = 96;

// Tokens that meet each group of weights in registers, where there are too few to decode it into the cache.
constexpr int64_t kFewTokens = 4;

// Bytes of scratch that a thread of the product needs: one group of decoded weights, integer and float sums of a tile,
// its outliers in 16 bits; or the inputs of few tokens, every 16 bytes twice.
BITWRIGHT_INLINE int64_t product_scratch(const Geometry& g) {
  const int64_t many = kTileRows * g.width() + kTokenBlock * kTileRows * 8 + g.outlier_width() * (kTileRows + 1) * 2;
  const int64_t few = kFewTokens * g.groups() * g.width() * 2;
  return round_up(many > few ? many : few, 64);
}

// A weight's code. The byte of channel c holds those of c, c + 16, c + 32 and c + 48 of its 64 channels.
BITWRIGHT_INLINE int code_at(const uint8_t* group, const Geometry& g, int64_t row, int64_t channel) {
  const int64_t slot = slot_of(row), line = slot / 4 * (g.width() / kStep) + channel / kStep;
  return (group[TileLayout::kCodes + line * 64 + slot % 4 * 16 + channel % 16] >> (channel % kStep / 16 * 2)) & 3;
}

// A row's four levels in a group, 128 added to each.
BITWRIGHT_INLINE const uint8_t* levels_of(const uint8_t* group, int64_t row) {
  return group + TileLayout::kLevels + slot_of(row) * 4;
}

// Sum of a row's levels over the true channels of group `index`: needed only where `rest` is not 0.
int32_t level_sum(const uint8_t* group, const Geometry& g, int64_t row, int64_t index);

float half_to_float(uint16_t half);

}  // namespace bitwright
