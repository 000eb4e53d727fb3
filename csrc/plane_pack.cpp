#include "plane_pack.h"

#include <cstring>

namespace bitwright {

namespace {

// Eight bits of a row of a plane from channel `from` on, a multiple of 8; those from channel `end` on are 0.
uint8_t line_of(const uint8_t* plane, int64_t from, int64_t end) {
  const int64_t left = end - from;
  if (left <= 0) return 0;
  const int mask = left < 8 ? (1 << left) - 1 : 255;
  return static_cast<uint8_t>(plane[from / 8] & mask);
}

}  // namespace

void pack_planes(const Neutral& from, const Geometry& g, uint8_t* packed, int threads) {
  const PlaneLayout layout(g);
  ask_for_large_pages(packed, g.tiles() * layout.bytes);
  const int64_t groups = g.groups(), stored = (g.normal() + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < g.rows; ++row) {
    uint8_t* tile = packed + row / kTileRows * layout.bytes;
    const int64_t place = row % kTileRows;
    const uint8_t* q = from.codes + row * stored;
    const uint8_t* m = from.codes + (g.rows + row) * stored;
    for (int64_t index = 0; index < groups; ++index) {
      uint8_t* group = tile + index * layout.group_bytes;
      int levels[4];
      for (int code = 0; code < 4; ++code) {
        levels[code] = from.levels ? from.levels[(row * groups + index) * 4 + code]
                                   : code - static_cast<int>(from.zeros[row * groups + index]);
        group[PlaneLayout::kLevels + place * 4 + code] = static_cast<uint8_t>(levels[code]);
      }
      std::memcpy(group + PlaneLayout::kScales + place * 2, from.scales + row * groups + index, 2);
      for (int64_t part = 0; part < layout.parts; ++part) {
        int sum = 0;
        const int64_t last = smaller(layout.lines, (part + 1) * kPartLines);
        for (int64_t line = part * kPartLines; line < last; ++line) {
          const int64_t channel = index * g.group + line * 8;
          const uint8_t low = line_of(q, channel, g.normal()), high = line_of(m, channel, g.normal());
          uint8_t* out = group + layout.codes_at + line * 64 + byte_of_row(place);
          out[0] = low;
          out[32] = high;
          for (int64_t i = 0; i < 8 && channel + i < g.normal(); ++i) {
            sum += levels[((low >> i) & 1) | (((high >> i) & 1) << 1)];
          }
        }
        const int16_t fits = static_cast<int16_t>(sum);
        std::memcpy(group + PlaneLayout::kSums + (part * kTileRows + place) * 2, &fits, 2);
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

}  // namespace bitwright
