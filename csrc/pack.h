// From the artifact's neutral tensors to tiles and back.
#pragma once
#include "site.h"

namespace bitwright {

// The stored tensors of one linear (docs/format.md): `levels` for free codebooks, `zeros` for uniform ones.
struct Neutral {
  const uint8_t* codes;           // [bits][rows][ceil(normal / 8)]
  const uint16_t* scales;         // [rows][groups], fp16
  const int8_t* levels;           // [rows][groups][2^bits], or null
  const uint8_t* zeros;           // [rows][groups], or null: the level of code c is c - zero
  const int8_t* outliers;         // [rows][outliers], or null
  const uint16_t* outlier_scales; // [rows], fp16, or null
};

int64_t packed_bytes(const Geometry&);

// Writes the tiles of one linear. `packed` was zeroed before. A site's linears stand one behind the other, each from a
// tile of its own on, so that they can be multiplied together or alone.
void pack(const Neutral&, const Geometry&, uint8_t* packed, int threads);

// The int8 channels of `rows` rows of one tile and their scales, which both kinds of tiles lay out alike.
void pack_outliers(const Neutral&, const Geometry&, int64_t first_row, int64_t rows, uint8_t* codes, uint8_t* scales);

// Dequantized weights of rows first..last in site order, fp32 [last - first][columns].
void unpack(const uint8_t* packed, const Geometry&, int64_t first, int64_t last, float* weights, int threads);

// Reads of weights go through 4 KB pages at a third of the speed of 2 MB pages on some hosts. A hint: it may be refused.
void ask_for_large_pages(uint8_t* memory, int64_t bytes);

}  // namespace bitwright
