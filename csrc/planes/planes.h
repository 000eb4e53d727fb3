// The boolean product of the paper: bit planes of weights times bit planes of inputs, by counting.
//
// The byte kernels (csrc/product) need inputs that are a step times an integer. Here the value of bit plane a of a
// token and group is a free number mu_a (BWA, appendix A), so the planes are counted apart.
//
// Packed weights are tiles of 32 rows, for each group:
//     int8 levels [32 rows][4 codes]      128 bytes
//     fp16 scales [32 rows]                64
//     int16 level sums [parts][32 rows]    64 a part: a part is up to 128 channels, its sum fits
//     for every 8 channels: q of the 32 rows, one byte a row, then m likewise: 64 bytes; bit i is channel i
// and after the last group the outliers as in the byte tiles: uint8 (weight + 128) [quads of channels][32 rows][4],
// fp32 scales [32 rows]. Everything is read in that order, and every part begins at a multiple of 64 bytes.
//
// The sum of the levels of a group multiplies the zero point. It is stored although the planes tell it: counting it
// is a fifth plane beside the four of a decoded token, a quarter more work, and reading it 5 % more bytes.
//
// Byte p of a line is row 8 (p / 4 % 4) + 4 (p / 16) + p % 4: unpacking bytes twice inside 16-byte lanes, as AVX2 and
// AVX-512 do, then brings the four counts of rows 8 r .. 8 r + 7 into the r-th register, in order.
#pragma once
#include "../site.h"

namespace bitwright {

constexpr int kPlanes = 4;
constexpr int64_t kPartLines = 16;  // lines of 8 channels in a part: counts up to 128 fit a byte

BITWRIGHT_INLINE int64_t byte_of_row(int64_t row) { return row / 8 * 4 + row % 8 / 4 * 16 + row % 4; }

// Offsets in bytes inside one tile.
struct PlaneLayout {
  static constexpr int64_t kLevels = 0, kScales = 128, kSums = 192;
  int64_t lines, parts, codes_at, group_bytes, outliers_at, outlier_scales_at, bytes;

  BITWRIGHT_INLINE explicit PlaneLayout(const Geometry& g)
      : lines(g.group / 8),
        parts((lines + kPartLines - 1) / kPartLines),
        codes_at(kSums + parts * kTileRows * 2),
        group_bytes(codes_at + lines * kTileRows * 2),
        outliers_at(g.groups() * group_bytes),
        outlier_scales_at(outliers_at + g.outlier_width() / 4 * 128),
        bytes(outlier_scales_at + kTileRows * 4) {}
};

enum class Balance { none, support, literal };

struct PlaneQuantizer {
  const int32_t* order;  // [columns], or null: channels are in site order already
  float cut;             // share of the range taken off at each end
  Balance balance;
};

// Quantized inputs of some tokens: xhat = sum over planes of mu_a b_a, plus offset.
struct PlaneActivations {
  int64_t tokens;
  uint16_t* words;       // [groups][tokens][group / 4]: bit 4 a + i of word c is plane a of channel 4 c + i
  uint8_t* ones;         // [groups][tokens][parts][planes]: channels of the part whose bit is 1
  float* scales;         // [groups][tokens][planes], mu_a
  float* offset;         // [groups][tokens], -(mu z)
  Activations outliers;  // of which only the three arrays of outliers are used
};

// One instruction set's functions, as Kernels in site.h.
struct PlaneKernels {
  const char* name;
  void (*quantize)(const float* x, const Geometry&, const PlaneQuantizer&, const PlaneActivations&, float* scratch,
                   int64_t first, int64_t last);
  void (*product)(const uint8_t* weights, const Geometry&, const PlaneActivations&, const float* bias, float* y,
                  uint8_t* scratch, int64_t first, int64_t last);
};

// Bytes of scratch that a thread of the product needs: one group of prepared planes, float sums of a tile.
BITWRIGHT_INLINE int64_t plane_scratch(const Geometry& g) { return g.group / 8 * 192 + kTokenBlock * kTileRows * 4; }

}  // namespace bitwright
