#include "pack.h"

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

}  // namespace

int64_t packed_bytes(const Geometry& g) { return g.tiles() * TileLayout(g).bytes; }

void pack(const Neutral& from, const Geometry& g, uint8_t* packed, int threads) {
  const TileLayout layout(g);
  ask_for_large_pages(packed, packed_bytes(g));
  const int64_t groups = g.groups(), plane_bytes = (g.normal() + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < g.rows; ++row) {
    uint8_t* tile = packed + row / kTileRows * layout.bytes;
    const int64_t place = row % kTileRows, slot = slot_of(place);
    const uint8_t* low = from.codes + row * plane_bytes;
    const uint8_t* high = from.codes + (g.rows + row) * plane_bytes;
    for (int64_t index = 0; index < groups; ++index) {
      uint8_t* group = tile + index * layout.group_bytes;
      for (int code = 0; code < 4; ++code) {
        const int level = from.levels ? from.levels[(row * groups + index) * 4 + code]
                                      : code - static_cast<int>(from.zeros[row * groups + index]);
        group[TileLayout::kLevels + slot * 4 + code] = static_cast<uint8_t>(level + 128);
      }
      std::memcpy(group + TileLayout::kScales + place * 2, from.scales + row * groups + index, 2);
      const int64_t first = index * g.group, channels = g.channels(index);
      uint8_t* lines = group + TileLayout::kCodes + slot / 4 * g.width() + slot % 4 * 16;
      for (int64_t channel = 0; channel < channels; ++channel) {
        const int64_t i = first + channel;
        const int code = ((low[i / 8] >> (i % 8)) & 1) | (((high[i / 8] >> (i % 8)) & 1) << 1);
        lines[channel / kStep * 64 + channel % 16] |= static_cast<uint8_t>(code << (channel % kStep / 16 * 2));
      }
    }
    for (int64_t channel = 0; channel < g.outliers; ++channel) {
      tile[layout.outliers_at + channel / 4 * 128 + place * 4 + channel % 4] =
          static_cast<uint8_t>(from.outliers[row * g.outliers + channel] + 128);
    }
    const float scale = from.outlier_scales ? half_to_float(from.outlier_scales[row]) : 0.0f;
    std::memcpy(tile + layout.outlier_scales_at + place * 4, &scale, 4);
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
      const uint8_t* levels = levels_of(group, place.row);
      for (int64_t channel = 0; channel < g.channels(index); ++channel) {
        const int level = levels[code_at(group, g, place.row, channel)] - 128;
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
