#include "levels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../site.h"
#include "partition.h"

// Every float operation stands here in the order in which the torch code does it, so that both give the same bits.

namespace bitwright {

namespace {

constexpr float kHalfMax = 65504.0f;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Unsigned integers in the order of the floats; both zeros are equal, as they are to a comparison.
uint32_t sortable(float value) {
  uint32_t bits = bits_of(value);
  if (bits == 0x80000000u) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Ascending by the upper 32 bits, stable; the sorted keys are in `keys` afterwards.
void sort_keys(std::vector<uint64_t>& keys, std::vector<uint64_t>& other, int64_t size) {
  if (size < 40) {  // the tables of counts would cost more than the sort
    for (int64_t i = 1; i < size; ++i) {
      const uint64_t key = keys[i];
      int64_t j = i;
      for (; j > 0 && keys[j - 1] > key; --j) keys[j] = keys[j - 1];
      keys[j] = key;
    }
    return;
  }
  uint32_t counts[4][256] = {};
  for (int64_t i = 0; i < size; ++i) {
    for (int byte = 0; byte < 4; ++byte) ++counts[byte][keys[i] >> (32 + 8 * byte) & 255];
  }
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 32 + 8 * byte;
    if (counts[byte][keys[0] >> shift & 255] == size) continue;  // the same in all of them
    uint32_t at = 0;
    for (uint32_t& count : counts[byte]) {
      const uint32_t here = count;
      count = at;
      at += here;
    }
    for (int64_t i = 0; i < size; ++i) other[counts[byte][keys[i] >> shift & 255]++] = keys[i];
    keys.swap(other);
  }
}

float clamp(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

// One symmetric bit has the levels -1 and 1, and no zero point.
GridRow uniform_grid(const float* w, int64_t width, int count, bool symmetric, float clip) {
  const float top = static_cast<float>(count - 1);
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    low = std::min(low, w[i]);
    high = std::max(high, w[i]);
  }
  if (low == 0.0f && high == 0.0f) {
    low = -1.0f;
    high = 1.0f;
  }
  GridRow row{};
  if (symmetric) {
    high = std::max(-low, high);
    low = -high;
  }
  low *= clip;
  high *= clip;
  if (symmetric) {
    if (count == 2) {
      row.scale = float_to_half(clamp(high, 6e-8f, kHalfMax));
      row.integers[0] = -1;
      row.integers[1] = 1;
      return row;
    }
  }
  row.scale = float_to_half(clamp((high - low) / top, 6e-8f, kHalfMax));
  const float zero = std::nearbyint(-low / half_to_float(row.scale));
  row.zero = static_cast<uint8_t>(symmetric ? count / 2 : static_cast<int>(clamp(zero, 0.0f, top)));
  for (int rank = 0; rank < std::min(count, kMostLevels); ++rank) row.integers[rank] = static_cast<int8_t>(rank - row.zero);
  return row;
}

void minmax(const float* w, int64_t width, int count, float* levels) {
  const auto ends = std::minmax_element(w, w + width);
  const float low = *ends.first, span = *ends.second - low;
  // As torch.linspace(0, 1) does it, from both ends, the difference rounded once.
  const float step = 1.0f / static_cast<float>(count - 1);
  for (int i = 0; i < count; ++i) {
    const float share = i < count / 2 ? step * static_cast<float>(i)
                                      : static_cast<float>(1.0 - static_cast<double>(step) * (count - 1 - i));
    levels[i] = low + span * share;
  }
}

}  // namespace

uint16_t float_to_half(float value) {
  uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (bits < 0x38800000u) {                        // subnormal: one half has its last bit where they have theirs
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return sign | static_cast<uint16_t>(bits_of(magnitude + 0.5f) - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

GridRow snap(const float* levels, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::fabs(levels[i]));
  GridRow row{};
  row.scale = float_to_half(std::min(largest / 127.0f, kHalfMax));
  if (row.scale == 0) row.scale = 0x3c00;  // 1: the whole row becomes zeros
  const float scale = half_to_float(row.scale);
  for (int i = 0; i < count; ++i) {
    row.integers[i] = static_cast<int8_t>(clamp(std::nearbyint(levels[i] / scale), -127.0f, 127.0f));
  }
  return row;
}

void LevelFinder::importance(const float* h, int64_t width) {
  h_ = h;
  width_ = width;
  const size_t size = static_cast<size_t>(width);
  keys_.resize(size);
  other_.resize(size);
  w_.resize(size);
  for (auto* sums : {&s0_, &s1_, &s2_, &before_, &best_}) sums->resize(size + 1);
  if (search_ == LevelSearch::dp) choice_.resize((size + 1) * static_cast<size_t>(count_ - 1));
}

void LevelFinder::real_levels(const float* w, float* levels) {
  if (search_ == LevelSearch::minmax) return minmax(w, width_, count_, levels);
  sort(w);
  search_ == LevelSearch::dp ? dp(levels) : em(levels);
}

GridRow LevelFinder::grid(const float* w) {
  if (search_ == LevelSearch::uniform) return uniform_grid(w, width_, count_, symmetric_, clip_);
  float levels[kMostLevels];
  real_levels(w, levels);
  return snap(levels, count_);
}

void LevelFinder::sort(const float* w) {
  for (int64_t i = 0; i < width_; ++i) keys_[i] = static_cast<uint64_t>(sortable(w[i])) << 32 | static_cast<uint64_t>(i);
  sort_keys(keys_, other_, width_);
  double s0 = 0.0, s1 = 0.0, s2 = 0.0;
  s0_[0] = s1_[0] = s2_[0] = 0.0;
  for (int64_t i = 0; i < width_; ++i) {
    const size_t place = keys_[i] & 0xffffffffu;
    const double weight = w[place], h = h_[place];
    w_[i] = weight;
    s0_[i + 1] = s0 += h;
    s1_[i + 1] = s1 += h * weight;
    s2_[i + 1] = s2 += h * weight * weight;
  }
}

// How many weights are not above `middle`, found by walking from where it was before.
int64_t LevelFinder::edge(double middle, int64_t from) const {
  while (from < width_ && w_[from] <= middle) ++from;
  while (from > 0 && w_[from - 1] > middle) --from;
  return from;
}

void LevelFinder::em(float* result) {
  double levels[kMostLevels];
  int64_t edges[kMostLevels + 1];
  edges[0] = 0;
  edges[count_] = width_;
  for (int i = 0; i < count_; ++i) {
    const double target = s0_[width_] * (static_cast<double>(2 * i + 1) / (2 * count_));
    const int64_t found = std::lower_bound(s0_.begin() + 1, s0_.end(), target) - s0_.begin() - 1;
    levels[i] = w_[std::min(found, width_ - 1)];
  }
  for (int i = 1; i < count_; ++i) {
    const double middle = (levels[i] + levels[i - 1]) / 2;
    edges[i] = std::upper_bound(w_.begin(), w_.end(), middle) - w_.begin();
  }
  for (int iteration = 0; iteration < iterations_; ++iteration) {
    for (int i = 0; i < count_; ++i) {
      const double mass = s0_[edges[i + 1]] - s0_[edges[i]], moment = s1_[edges[i + 1]] - s1_[edges[i]];
      if (mass > 0) levels[i] = moment / mass;
    }
    // In order but for rounding: a mean may land a hair beyond its neighbour.
    for (int i = 1; i < count_; ++i) {
      for (int j = i; j > 0 && levels[j - 1] > levels[j]; --j) std::swap(levels[j - 1], levels[j]);
    }
    bool moved = false;
    for (int i = 1; i < count_; ++i) {
      const int64_t now = edge((levels[i] + levels[i - 1]) / 2, edges[i]);
      moved |= now != edges[i];
      edges[i] = now;
    }
    if (!moved) break;
  }
  for (int i = 0; i < count_; ++i) result[i] = static_cast<float>(levels[i]);
}

// Of one level for the sorted weights a..b-1.
inline double LevelFinder::cost(int64_t a, int64_t b) const {
  const double mass = s0_[b] - s0_[a], moment = s1_[b] - s1_[a], square = s2_[b] - s2_[a];
  const double found = square - moment * moment / (mass > 0 ? mass : 1.0);
  return found < 0.0 ? 0.0 : found;
}

void LevelFinder::dp(float* result) {
  const int64_t stride = width_ + 1;
  for (int64_t b = 0; b <= width_; ++b) best_[b] = cost(0, b);
  for (int step = 0; step < count_ - 1; ++step) {
    before_.swap(best_);
    // Of the last step only the whole row is asked for.
    const int64_t first = step == count_ - 2 ? width_ : 0;
    partition_step([this](int64_t a, int64_t b) { return cost(a, b); }, before_.data(), best_.data(),
                   choice_.data() + step * stride, first, width_, 0, width_);
  }
  int64_t end = width_;
  double level = w_[width_ - 1];
  for (int i = count_ - 1; i >= 0; --i) {
    const int64_t begin = i ? choice_[(i - 1) * stride + end] : 0;
    const double mass = s0_[end] - s0_[begin];
    if (mass > 0) level = (s1_[end] - s1_[begin]) / mass;
    result[i] = static_cast<float>(level);
    end = begin;
  }
}

void find_levels(const LevelFinder& finder, const float* block, const float* importance, int64_t rows, int64_t width,
                 int8_t* integers, uint16_t* scales, uint8_t* zeros, int threads) {
  if (rows == 0) return;
  const int levels = finder.count(), parts = static_cast<int>(std::min<int64_t>(threads, rows));
  // All memory before the parallel region: an exception must not leave it.
  std::vector<LevelFinder> finders(static_cast<size_t>(parts), finder);
  for (LevelFinder& one : finders) one.importance(importance, width);
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int part = 0; part < parts; ++part) {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      const GridRow grid = finders[static_cast<size_t>(part)].grid(block + row * width);
      std::copy(grid.integers, grid.integers + levels, integers + row * levels);
      scales[row] = grid.scale;
      zeros[row] = grid.zero;
    }
  }
}

}  // namespace bitwright
