// The step of the dynamic programmes that cut sorted values into intervals of least cost: levels.cpp, grouping.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace bitwright {

// best[b] = min over a of before[a] + cost(a, b) for b in first..last, where the smallest such a is known to lie in
// low..high. It never falls as b grows (the costs satisfy the quadrangle inequality), so the middle b halves the task.
template <typename Cost>
void partition_step(const Cost& cost, const double* before, double* best, int32_t* choice, int64_t first, int64_t last,
                    int64_t low, int64_t high) {
  while (first <= last) {
    const int64_t b = (first + last) / 2;
    double least = INFINITY;
    int64_t at = low;
    for (int64_t a = low, end = std::min(high, b); a <= end; ++a) {
      const double total = before[a] + cost(a, b);
      if (total < least) {
        least = total;
        at = a;
      }
    }
    best[b] = least;
    choice[b] = static_cast<int32_t>(at);
    partition_step(cost, before, best, choice, first, b - 1, low, at);
    first = b + 1;
    low = at;
  }
}

}  // namespace bitwright
