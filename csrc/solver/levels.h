// Levels of one row of a group: the searches of bitwright/solvers/levels.py, one row at a time.
#pragma once
#include <cstdint>
#include <vector>

namespace bitwright {

constexpr int kMostLevels = 16;  // that are looked up: codes of 1 to 4 bits; those of more bits are computed

enum class LevelSearch : int { em = 0, dp = 1, minmax = 2, uniform = 3 };

// Integer levels, ascending by rank (of more than 16 none), their fp16 scale, and the zero point of a uniform grid.
struct GridRow {
  int8_t integers[kMostLevels];
  uint16_t scale;
  uint8_t zero;
};

// Memory that a thread keeps from row to row.
class LevelFinder {
 public:
  // Only a uniform grid can be symmetric, or span a share of the range: `clip`.
  LevelFinder(LevelSearch search, int bits, int iterations, bool symmetric = false, float clip = 1.0f)
      : search_(search), count_(1 << bits), iterations_(iterations), symmetric_(symmetric), clip_(clip) {}

  // The weights that all following rows stand in front of: h [width], at least 0.
  void importance(const float* h, int64_t width);

  // Levels of w [width] before they are snapped, [2^bits] ascending; em, dp and minmax only.
  void real_levels(const float* w, float* levels);

  // Levels of w [width] on the grid that the format stores.
  GridRow grid(const float* w);

  int count() const { return count_; }

 private:
  void sort(const float* w);
  void em(float* levels);
  void dp(float* levels);
  double cost(int64_t a, int64_t b) const;
  int64_t edge(double middle, int64_t from) const;

  LevelSearch search_;
  int count_, iterations_;
  bool symmetric_;
  float clip_;
  int64_t width_ = 0;
  const float* h_ = nullptr;
  std::vector<uint64_t> keys_, other_;          // sortable bits of a weight above its place in the row
  std::vector<double> w_, s0_, s1_, s2_;        // ascending weights; prefix sums of h, h w, h w^2
  std::vector<double> before_, best_;           // dp: least cost of the first b weights
  std::vector<int32_t> choice_;                 // dp: where the last interval begins, [2^bits - 1][width + 1]
};

// The grids of all rows of block [rows][width], which share the importances [width]: integers [rows][2^bits], scales
// fp16 [rows], zeros [rows]. `finder` says how they are searched; the result does not depend on `threads`.
void find_levels(const LevelFinder& finder, const float* block, const float* importance, int64_t rows, int64_t width,
                 int8_t* integers, uint16_t* scales, uint8_t* zeros, int threads);

// The nearest int8 multiples of max |level| / 127, rounded to fp16; levels [count].
GridRow snap(const float* levels, int count);

// The nearest fp16 number, ties to even.
uint16_t float_to_half(float value);

}  // namespace bitwright
