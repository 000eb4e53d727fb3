#include "pack.h"

#include <array>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bitwright {

void ask_for_large_pages(uint8_t* memory, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 2u << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

namespace {

struct Place {
  const uint8_t* tile;
  int64_t row;  // inside the tile
};

Place find(const uint8_t* packed, const TileLayout& layout, int64_t row) {
  return {packed + row / kTileRows * layout.bytes, row % kTileRows};
}

uint8_t code_at(const uint8_t* group, int64_t row, int64_t channel) {
  const uint8_t byte = group[TileLayout::kCodes + channel / kStep * 128 + row * 4 + channel % 4];
  return (byte >> (channel % kStep / 4 * 2)) & 3;
}

// Eight bits of a plane, spread to where two-bit codes have them: bit 4 k + b to bit 2 k of byte b.
constexpr std::array<uint32_t, 256> kSpread = [] {
  std::array<uint32_t, 256> spread{};
  for (uint32_t bits = 0; bits < 256; ++bits) {
    for (uint32_t i = 0; i < 8; ++i) spread[bits] |= ((bits >> i) & 1) << (i % 4 * 8 + i / 4 * 2);
  }
  return spread;
}();

// Two whole bytes of a plane, spread.
uint32_t spread_step(const uint8_t* at) { return kSpread[at[0]] | kSpread[at[1]] << 4; }

// `count` (1 to 16) bits from bit `shift` of the first byte on, spread.
uint32_t spread_bits(const uint8_t* at, int shift, int count) {
  const int end = shift + count;
  uint32_t bits = at[0];
  if (end > 8) bits |= static_cast<uint32_t>(at[1]) << 8;
  if (end > 16) bits |= static_cast<uint32_t>(at[2]) << 16;
  bits = (bits >> shift) & ((1u << count) - 1);
  return kSpread[bits & 255] | kSpread[bits >> 8] << 4;
}

void pack_tile(const Neutral& from, const Geometry& g, const TileLayout& layout, int64_t first_row, uint8_t* tile) {
  const int64_t groups = g.groups(), plane_bytes = (g.normal() + 7) / 8;
  const int64_t rows = smaller(kTileRows, g.rows - first_row);
  // All rows of a group together: they fill the same lines.
  for (int64_t index = 0; index < groups; ++index) {
    uint8_t* group = tile + index * layout.group_bytes;
    const int64_t first = index * g.group, channels = g.channels(index);
    const int shift = static_cast<int>(first % 8);
    for (int64_t place = 0; place < rows; ++place) {
      const int64_t row = first_row + place, record = row * groups + index;
      for (int code = 0; code < 4; ++code) {
        const int level = from.levels ? from.levels[record * 4 + code] : code - static_cast<int>(from.zeros[record]);
        group[TileLayout::kLevels + place * 4 + code] = static_cast<uint8_t>(level + 128);
      }
      std::memcpy(group + TileLayout::kScales + place * 2, from.scales + record, 2);
      const uint8_t* low = from.codes + row * plane_bytes + first / 8;
      const uint8_t* high = low + g.rows * plane_bytes;
      uint8_t* out = group + TileLayout::kCodes + place * 4;
      int64_t left = channels;
      if (shift == 0) {
        for (; left >= kStep; left -= kStep, low += 2, high += 2, out += 128) {
          const uint32_t codes = spread_step(low) | spread_step(high) << 1;
          std::memcpy(out, &codes, 4);
        }
      }
      for (; left > 0; left -= kStep, low += 2, high += 2, out += 128) {
        const int count = static_cast<int>(smaller(kStep, left));
        const uint32_t codes = spread_bits(low, shift, count) | spread_bits(high, shift, count) << 1;
        std::memcpy(out, &codes, 4);
      }
    }
  }
  pack_outliers(from, g, first_row, rows, tile + layout.outliers_at, tile + layout.outlier_scales_at);
}

}  // namespace

void pack_outliers(const Neutral& from, const Geometry& g, int64_t first_row, int64_t rows, uint8_t* codes,
                   uint8_t* scales) {
  for (int64_t place = 0; place < rows; ++place) {
    const int64_t row = first_row + place;
    for (int64_t channel = 0; channel < g.outliers; ++channel) {
      codes[channel / 4 * 128 + place * 4 + channel % 4] =
          static_cast<uint8_t>(from.outliers[row * g.outliers + channel] + 128);
    }
    const float scale = from.outlier_scales ? half_to_float(from.outlier_scales[row]) : 0.0f;
    std::memcpy(scales + place * 4, &scale, 4);
  }
}

int64_t packed_bytes(const Geometry& g) { return g.tiles() * TileLayout(g).bytes; }

void pack(const Neutral& from, const Geometry& g, uint8_t* packed, int threads) {
  const TileLayout layout(g);
  ask_for_large_pages(packed, packed_bytes(g));
  const int64_t tiles = g.tiles();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    pack_tile(from, g, layout, tile * kTileRows, packed + tile * layout.bytes);
  }
}

void unpack(const uint8_t* packed, const Geometry& g, int64_t first, int64_t last, float* weights, int threads) {
  const TileLayout layout(g);
  const int64_t groups = g.groups();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = first; row < last; ++row) {
    const Place place = find(packed, layout, row);
    float* out = weights + (row - first) * g.columns;
    for (int64_t index = 0; index < groups; ++index) {
      const uint8_t* group = place.tile + index * layout.group_bytes;
      uint16_t half;
      std::memcpy(&half, group + TileLayout::kScales + place.row * 2, 2);
      const float scale = half_to_float(half);
      for (int64_t channel = 0; channel < g.channels(index); ++channel) {
        const int level = group[TileLayout::kLevels + place.row * 4 + code_at(group, place.row, channel)] - 128;
        *out++ = static_cast<float>(level) * scale;
      }
    }
    float scale;
    std::memcpy(&scale, place.tile + layout.outlier_scales_at + place.row * 4, 4);
    for (int64_t channel = 0; channel < g.outliers; ++channel) {
      const int level = place.tile[layout.outliers_at + channel / 4 * 128 + place.row * 4 + channel % 4] - 128;
      *out++ = static_cast<float>(level) * scale;
    }
  }
}

}  // namespace bitwright
