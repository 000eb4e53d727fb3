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

// `count` (1 to 64) bits of a plane from bit `shift` (0 to 7) of the first byte on.
inline uint64_t bits_of(const uint8_t* at, int shift, int64_t count) {
  if (shift == 0 && count == 64) {
    uint64_t bits;
    std::memcpy(&bits, at, 8);
    return bits;
  }
  uint8_t bytes[16] = {};
  std::memcpy(bytes, at, static_cast<size_t>((shift + count + 7) / 8));
  uint64_t low, high;
  std::memcpy(&low, bytes, 8);
  std::memcpy(&high, bytes + 8, 8);
  const uint64_t bits = shift ? low >> shift | high << (64 - shift) : low;
  return count == 64 ? bits : bits & ((uint64_t{1} << count) - 1);
}

// Eight bytes as an 8 x 8 matrix of bits, transposed (Warren, Hacker's Delight, section 7-3).
inline uint64_t transposed(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00aa00aa00aa00aau;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000cccc0000ccccu;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000f0f0f0f0u;
  return x ^ t ^ (t << 28);
}

// The codes of one row and group. Eight bytes that hold eight channels of each plane, transposed as bits, are eight codes.
// (Little-endian, as all that this is built for.) `plane`: bytes from one plane to the next.
inline void pack_codes(const uint8_t* codes, int64_t plane, int shift, int64_t channels, const Geometry& g,
                       uint8_t* lines) {
  const int stored = g.stored();
  for (int64_t first = 0; first < channels; first += kStep, codes += 8, lines += stored / 2 * 64) {
    const int64_t count = smaller(kStep, channels - first);
    uint64_t planes[8];
    for (int bit = 0; bit < g.bits; ++bit) planes[bit] = bits_of(codes + bit * plane, shift, count);
    for (int eight = 0; eight < 8; ++eight) {
      uint64_t bytes = 0;
      for (int bit = 0; bit < g.bits; ++bit) bytes |= (planes[bit] >> eight * 8 & 255) << bit * 8;
      // Sixteen channels fill the 16 bytes of a line once; the next sixteen stand above them, or in the next line.
      const int sixteen = eight / 2, share = 8 / stored;
      uint8_t* half = lines + sixteen / share * 64 + eight % 2 * 8;
      uint64_t word;
      std::memcpy(&word, half, 8);
      word |= transposed(bytes) << sixteen % share * stored;
      std::memcpy(half, &word, 8);
    }
  }
}

// The same for two planes, in two transpositions instead of eight: of 64 channels, bytes 0, 2, 4, 6 of both planes side
// by side are the first eight bytes of codes, bytes 1, 3, 5, 7 the other eight.
inline void pack_pairs(const uint8_t* low, const uint8_t* high, int shift, int64_t channels, uint8_t* lines) {
  constexpr uint64_t kEven = 0x00ff00ff00ff00ffu;
  for (int64_t first = 0; first < channels; first += kStep, low += 8, high += 8, lines += 64) {
    const int64_t count = smaller(kStep, channels - first);
    const uint64_t l = bits_of(low, shift, count), h = bits_of(high, shift, count);
    const uint64_t halves[2] = {transposed((l & kEven) | (h & kEven) << 8), transposed((l >> 8 & kEven) | (h & ~kEven))};
    std::memcpy(lines, halves, 16);
  }
}

// The levels of one row and group, 128 added, or its zero point. `packed` is what levels_of finds.
inline void pack_levels(const Neutral& from, const Geometry& g, int64_t record, uint8_t* packed) {
  if (!g.table) {
    *packed = from.zeros[record];
    return;
  }
  for (int code = 0; code < 1 << g.bits; ++code) {
    const int level = from.levels ? from.levels[(record << g.bits) + code] : code - static_cast<int>(from.zeros[record]);
    packed[code] = static_cast<uint8_t>(level + 128);
  }
}

void pack_tile(const Neutral& from, const Geometry& g, const TileLayout& layout, int64_t first_row, uint8_t* tile) {
  const int64_t groups = g.groups(), plane_bytes = (g.normal() + 7) / 8, plane = g.rows * plane_bytes;
  const int64_t rows = smaller(kTileRows, g.rows - first_row);
  // All rows of a group together: they fill the same lines.
  for (int64_t index = 0; index < groups; ++index) {
    uint8_t* group = tile + index * layout.group_bytes;
    const int64_t first = index * g.group, channels = g.channels(index);
    const int shift = static_cast<int>(first % 8);
    for (int64_t place = 0; place < rows; ++place) {
      const int64_t row = first_row + place, record = row * groups + index, slot = slot_of(place);
      pack_levels(from, g, record, group + (g.table ? slot << g.stored() : place));
      std::memcpy(group + layout.scales + place * 2, from.scales + record, 2);
      const uint8_t* codes = from.codes + row * plane_bytes + first / 8;
      uint8_t* lines = group + layout.codes + slot / 4 * g.width() * g.stored() / 2 + slot % 4 * 16;
      if (g.bits == 2) {
        pack_pairs(codes, codes + plane, shift, channels, lines);
      } else {
        pack_codes(codes, plane, shift, channels, g, lines);
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
      std::memcpy(&half, group + layout.scales + place.row * 2, 2);
      const float scale = half_to_float(half);
      for (int64_t channel = 0; channel < g.channels(index); ++channel) {
        *out++ = static_cast<float>(level_at(group, g, place.row, channel)) * scale;
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
