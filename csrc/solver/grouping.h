// Groups of magnitudes shared by a whole matrix (WGM): src/bitwright/solvers/grouping.py says what and why.
#pragma once
#include <cstdint>

namespace bitwright {

// Neighbouring groups, by what their merging needs: members, mean and squared error.
struct Members {
  const int64_t* count;
  const double *mean, *error;
  int64_t size;
};

// Merges neighbours, the cheapest merged pair first, until `groups` are left. begins [groups] receives the first of each.
void merge_groups(const Members&, int64_t groups, double penalty, int64_t* begins);

// The cut of ascending values with counts into `groups` <= size intervals of least cost; begins [groups] as above.
// The cost of an interval of m members is their squared error plus penalty / m.
void optimal_groups(const double* values, const int64_t* counts, int64_t size, int64_t groups, double penalty,
                    int64_t* begins);

// Adds the number of weights, floats of 16 bits, of each magnitude to counts [32768], by their patterns without the sign.
void count_magnitudes(const uint16_t* weights, int64_t count, int64_t* counts);

// Codes by pattern, code_of [65536], into planes [bits][rows][ceil(columns / 8)] (docs/format.md); rows are `stride` apart.
void encode_patterns(const uint16_t* weights, int64_t rows, int64_t columns, int64_t stride, const uint8_t* code_of,
                     int bits, uint8_t* planes);

}  // namespace bitwright
