#include "plane_pack.h"

#include <algorithm>
#include <array>
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

constexpr std::array<uint8_t, 256> kOnes = [] {
  std::array<uint8_t, 256> ones{};
  for (int bits = 1; bits < 256; ++bits) ones[bits] = static_cast<uint8_t>(ones[bits / 2] + bits % 2);
  return ones;
}();

void pack_tile(const Neutral& from, const Geometry& g, const PlaneLayout& layout, int64_t first_row, uint8_t* tile) {
  const int64_t groups = g.groups(), stored = (g.normal() + 7) / 8;
  const int64_t rows = smaller(kTileRows, g.rows - first_row);
  // All rows of a group together: they fill the same lines.
  for (int64_t index = 0; index < groups; ++index) {
    uint8_t* group = tile + index * layout.group_bytes;
    for (int64_t place = 0; place < rows; ++place) {
      const int64_t row = first_row + place, record = row * groups + index;
      const uint8_t* q = from.codes + row * stored;
      const uint8_t* m = from.codes + (g.rows + row) * stored;
      int levels[4];
      for (int code = 0; code < 4; ++code) {
        levels[code] = from.levels ? from.levels[record * 4 + code] : code - static_cast<int>(from.zeros[record]);
        group[PlaneLayout::kLevels + place * 4 + code] = static_cast<uint8_t>(levels[code]);
      }
      std::memcpy(group + PlaneLayout::kScales + place * 2, from.scales + record, 2);
      for (int64_t part = 0; part < layout.parts; ++part) {
        int of_q = 0, of_m = 0, of_both = 0;  // how many channels of the part have the bit
        const int64_t begin = part * kPartLines, end = smaller(layout.lines, begin + kPartLines);
        for (int64_t line = begin; line < end; ++line) {
          const int64_t channel = index * g.group + line * 8;
          const uint8_t low = line_of(q, channel, g.normal()), high = line_of(m, channel, g.normal());
          uint8_t* out = group + layout.codes_at + line * 64 + byte_of_row(place);
          out[0] = low;
          out[32] = high;
          of_q += kOnes[low];
          of_m += kOnes[high];
          of_both += kOnes[low & high];
        }
        // None where the last group is so short that it ends before this part.
        const int channels = std::max(0, static_cast<int>(smaller(g.channels(index), end * 8) - begin * 8));
        const int sum = levels[0] * (channels - of_q - of_m + of_both) + levels[1] * (of_q - of_both) +
                        levels[2] * (of_m - of_both) + levels[3] * of_both;
        const int16_t fits = static_cast<int16_t>(sum);
        std::memcpy(group + PlaneLayout::kSums + (part * kTileRows + place) * 2, &fits, 2);
      }
    }
  }
  pack_outliers(from, g, first_row, rows, tile + layout.outliers_at, tile + layout.outlier_scales_at);
}

}  // namespace

void pack_planes(const Neutral& from, const Geometry& g, uint8_t* packed, int threads) {
  const PlaneLayout layout(g);
  ask_for_large_pages(packed, g.tiles() * layout.bytes);
  const int64_t tiles = g.tiles();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    pack_tile(from, g, layout, tile * kTileRows, packed + tile * layout.bytes);
  }
}

}  // namespace bitwright
