#include "grouping.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <vector>

#include "partition.h"

namespace bitwright {

namespace {

// Two neighbouring groups, by the first of the left one, the first of the right one, and what comes after that.
struct Pair {
  double cost;
  int64_t begin, middle, end;
};

// The order of the queue: by cost, then by begin and end. No two valid pairs are equal.
struct Later {
  bool operator()(const Pair& a, const Pair& b) const {
    if (a.cost != b.cost) return a.cost > b.cost;
    if (a.begin != b.begin) return a.begin > b.begin;
    return a.end > b.end;
  }
};

// Costs of intervals from prefix sums; an empty one is none.
class Costs {
 public:
  Costs(const double* values, const int64_t* counts, int64_t size, double penalty)
      : count_(size + 1), first_(size + 1), second_(size + 1), penalty_(penalty) {
    for (int64_t i = 0; i < size; ++i) {
      const double weight = static_cast<double>(counts[i]);
      count_[i + 1] = count_[i] + weight;
      first_[i + 1] = first_[i] + weight * values[i];
      second_[i + 1] = second_[i] + weight * values[i] * values[i];
    }
  }

  double operator()(int64_t begin, int64_t end) const {
    if (begin == end) return std::numeric_limits<double>::infinity();
    const double count = count_[end] - count_[begin], first = first_[end] - first_[begin];
    const double error = second_[end] - second_[begin] - first * first / count;
    return (error > 0.0 ? error : 0.0) + penalty_ / count;
  }

 private:
  std::vector<double> count_, first_, second_;
  double penalty_;
};

}  // namespace

void merge_groups(const Members& members, int64_t groups, double penalty, int64_t* begins) {
  const int64_t size = members.size;
  std::vector<double> count(size), mean(members.mean, members.mean + size), error(members.error, members.error + size);
  for (int64_t i = 0; i < size; ++i) count[i] = static_cast<double>(members.count[i]);
  // A group stands at its first member; end 0 marks those that were merged into their left neighbour.
  std::vector<int64_t> end(size), previous(size);
  for (int64_t i = 0; i < size; ++i) {
    end[i] = i + 1;
    previous[i] = i - 1;
  }
  const auto merged_error = [&](int64_t a, int64_t b) {
    const double apart = mean[b] - mean[a];
    return error[a] + error[b] + count[a] * count[b] / (count[a] + count[b]) * (apart * apart);
  };
  const auto pair = [&](int64_t a, int64_t b) {
    return Pair{merged_error(a, b) + penalty / (count[a] + count[b]), a, b, end[b]};
  };
  std::vector<Pair> start;
  start.reserve(2 * size);
  for (int64_t i = 0; i + 1 < size; ++i) start.push_back(pair(i, i + 1));
  std::priority_queue<Pair, std::vector<Pair>, Later> queue(Later(), std::move(start));
  for (int64_t left = size; left > groups;) {
    const Pair best = queue.top();
    queue.pop();
    const int64_t a = best.begin, b = best.middle;
    if (end[a] != b || end[b] != best.end) continue;  // one of the two has changed since
    error[a] = merged_error(a, b);
    mean[a] = (count[a] * mean[a] + count[b] * mean[b]) / (count[a] + count[b]);
    count[a] += count[b];
    end[a] = best.end;
    end[b] = 0;
    if (best.end < size) {
      previous[best.end] = a;
      queue.push(pair(a, best.end));
    }
    if (previous[a] >= 0) queue.push(pair(previous[a], a));
    --left;
  }
  for (int64_t i = 0; i < size; i = end[i]) *begins++ = i;
}

void optimal_groups(const double* values, const int64_t* counts, int64_t size, int64_t groups, double penalty,
                    int64_t* begins) {
  const Costs cost(values, counts, size, penalty);
  std::vector<double> before(size + 1), best(size + 1, std::numeric_limits<double>::infinity());
  std::vector<int32_t> choices(static_cast<size_t>(groups) * (size + 1));
  for (int64_t end = 1; end <= size; ++end) best[end] = cost(0, end);
  for (int64_t group = 1; group < groups; ++group) {
    before.swap(best);
    std::fill(best.begin(), best.end(), std::numeric_limits<double>::infinity());
    partition_step(cost, before.data(), best.data(), choices.data() + group * (size + 1), group + 1, size, group, size);
  }
  int64_t end = size;
  for (int64_t group = groups - 1; group >= 0; --group) {
    end = choices[group * (size + 1) + end];
    begins[group] = end;
  }
}

void count_magnitudes(const uint16_t* weights, int64_t count, int64_t* counts) {
  // Trained weights crowd on few patterns: with several counters each, one does not wait for the one before.
  constexpr int kParts = 4;
  constexpr int64_t kMost = int64_t{1} << 30;
  std::vector<uint32_t> parts(static_cast<size_t>(kParts) << 15);
  for (int64_t start = 0; start < count; start += kMost) {
    const int64_t end = std::min(count, start + kMost);
    std::fill(parts.begin(), parts.end(), 0u);
    int64_t i = start;
    for (; i + kParts <= end; i += kParts) {
      for (int part = 0; part < kParts; ++part) ++parts[(part << 15) + (weights[i + part] & 0x7fff)];
    }
    for (; i < end; ++i) ++parts[weights[i] & 0x7fff];
    for (size_t at = 0; at < parts.size(); ++at) counts[at & 0x7fff] += parts[at];
  }
}

void encode_patterns(const uint16_t* weights, int64_t rows, int64_t columns, int64_t stride, const uint8_t* code_of,
                     int bits, uint8_t* planes) {
  const int64_t width = (columns + 7) / 8;
  for (int64_t row = 0; row < rows; ++row) {
    const uint16_t* from = weights + row * stride;
    for (int64_t byte = 0; byte < width; ++byte, from += 8) {
      const int64_t left = columns - byte * 8;
      uint64_t codes = 0;
      if (left >= 8) {
        for (int i = 0; i < 8; ++i) codes |= static_cast<uint64_t>(code_of[from[i]]) << (8 * i);
      } else {
        for (int i = 0; i < left; ++i) codes |= static_cast<uint64_t>(code_of[from[i]]) << (8 * i);
      }
      for (int bit = 0; bit < bits; ++bit) {
        // The multiplication gathers the lowest bit of byte i as bit 56 + i.
        const uint64_t gathered = ((codes >> bit) & 0x0101010101010101u) * 0x0102040810204080u;
        planes[(bit * rows + row) * width + byte] = static_cast<uint8_t>(gathered >> 56);
      }
    }
  }
}

}  // namespace bitwright
