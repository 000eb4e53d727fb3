#include "feedback.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "memory.h"

namespace bitwright {

namespace {

// Rows that share one packing of U: enough that it costs little, few enough that their errors of a block stay in L2.
constexpr int64_t kChunkRows = 256;

// One thread's share of the work: chunks of rows, strip by strip inside.
class Chunk {
 public:
  Chunk(const SolverKernels& kernels, const SolveInputs& in, const SolveOptions& options, const SolveOutputs& out,
        int64_t rows)
      : kernels_(kernels),
        in_(in),
        options_(options),
        out_(out),
        finder_(options.levels, options.bits, options.iterations, options.symmetric, options.clip),
        count_(1 << options.bits),
        normal_(in.columns - in.outliers),
        groups_((normal_ + in.group - 1) / in.group),
        width_(smaller(in.group, normal_)),
        strip_(in.columns * kStripRows),
        work_(make_array<float>(rows / kStripRows * strip_)),
        errors_(make_array<float>(rows * width_)),
        panel_(make_array<float>(width_ * kPanel)),
        row_(make_array<float>(width_)),
        ranks_(make_array<uint8_t>(width_ * kStripRows)) {}

  void solve(int64_t first, int64_t rows) {
    first_ = first;
    rows_ = rows;
    const int64_t strips = (rows + kStripRows - 1) / kStripRows;
    for (int64_t s = 0; s < strips; ++s) read(s);
    const int64_t reach = options_.feedback_outliers ? in_.columns : normal_;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t start = g * in_.group, stop = smaller(start + in_.group, normal_);
      finder_.importance(in_.importance + start, stop - start);
      for (int64_t s = 0; s < strips; ++s) quantize(s, g, start, stop);
      if (options_.feedback != Feedback::none) update(strips, start, stop, reach);
    }
    if (in_.outliers) {
      for (int64_t row = 0; row < rows_; ++row) quantize_outliers(row);
    }
  }

 private:
  float* column(int64_t strip, int64_t index) { return work_.get() + strip * strip_ + index * kStripRows; }

  // Rows that do not exist are zeros, and nobody reads what becomes of them.
  void read(int64_t s) {
    float* strip = column(s, 0);
    for (int64_t r = 0; r < kStripRows; ++r) {
      const int64_t row = s * kStripRows + r;
      const float* from = row < rows_ ? in_.weights + (first_ + row) * in_.columns : nullptr;
      for (int64_t c = 0; c < in_.columns; ++c) strip[c * kStripRows + r] = from && !in_.dead[c] ? from[c] : 0.0f;
    }
  }

  void quantize(int64_t s, int64_t g, int64_t start, int64_t stop) {
    const int64_t width = stop - start;
    float values[kMostLevels * kStripRows] = {}, step[kStripRows], lowest[kStripRows] = {};
    std::fill(step, step + kStripRows, 1.0f);
    const bool looked_up = count_ <= kMostLevels;
    const int64_t present = smaller(kStripRows, rows_ - s * kStripRows);
    for (int64_t r = 0; r < present; ++r) {
      const float* from = column(s, start) + r;
      for (int64_t c = 0; c < width; ++c) row_[c] = from[c * kStripRows];
      const GridRow grid = finder_.grid(row_.get());
      const float scale = half_to_float(grid.scale);
      for (int i = 0; looked_up && i < count_; ++i) {
        values[i * kStripRows + r] = static_cast<float>(grid.integers[i]) * scale;
      }
      step[r] = scale;
      lowest[r] = -static_cast<float>(grid.zero);
      write_codebook(first_ + s * kStripRows + r, g, grid);
    }
    const Block block{width,
                      column(s, start),
                      looked_up ? values : nullptr,
                      count_,
                      in_.upper + start * (in_.columns + 1),
                      in_.columns,
                      ranks_.get(),
                      errors_.get() + s * width_ * kStripRows,
                      step,
                      lowest};
    kernels_.assign(options_.feedback, block);
    for (int64_t r = 0; r < present; ++r) write_codes(first_ + s * kStripRows + r, r, start, width);
  }

  // The code of a rank: two-bit codes are planes of sign and membership (codebook.py, code_of_rank).
  int code(int rank) const {
    constexpr int pairs[4] = {2, 0, 1, 3};
    return options_.bits == 2 && out_.levels ? pairs[rank] : rank;
  }

  void write_codebook(int64_t row, int64_t g, const GridRow& grid) {
    const int64_t at = row * groups_ + g;
    out_.scales[at] = grid.scale;
    if (out_.zeros) out_.zeros[at] = grid.zero;
    if (!out_.levels) return;
    for (int rank = 0; rank < count_; ++rank) out_.levels[at * count_ + code(rank)] = grid.integers[rank];
  }

  void write_codes(int64_t row, int64_t r, int64_t start, int64_t width) {
    const int64_t bytes = (normal_ + 7) / 8;
    uint8_t table[kMostLevels];
    for (int rank = 0; rank < smaller(count_, kMostLevels); ++rank) table[rank] = static_cast<uint8_t>(code(rank));
    for (int64_t c = 0; c < width; c += 8) {
      uint8_t planes[8] = {};
      for (int64_t i = 0; i < smaller<int64_t>(8, width - c); ++i) {
        const uint8_t rank = ranks_[(c + i) * kStripRows + r];
        const uint32_t code = count_ <= kMostLevels ? table[rank] : rank;
        for (int p = 0; p < options_.bits; ++p) planes[p] = static_cast<uint8_t>(planes[p] | (code >> p & 1) << i);
      }
      for (int p = 0; p < options_.bits; ++p) {
        out_.planes[(p * in_.rows + row) * bytes + (start + c) / 8] = planes[p];
      }
    }
  }

  void update(int64_t strips, int64_t start, int64_t stop, int64_t reach) {
    const int64_t width = stop - start;
    for (int64_t first = stop; first < reach; first += kPanel) {
      const int64_t columns = smaller(kPanel, reach - first);
      for (int64_t k = 0; k < width; ++k) {
        float* to = panel_.get() + k * kPanel;
        std::memcpy(to, in_.upper + (start + k) * in_.columns + first, static_cast<size_t>(columns) * 4);
        std::fill(to + columns, to + kPanel, 0.0f);
      }
      for (int64_t s = 0; s < strips; ++s) {
        kernels_.update(errors_.get() + s * width_ * kStripRows, width, panel_.get(), columns, column(s, first));
      }
    }
  }

  // Symmetric int8, one scale a row: quantize_outlier_columns of feedback.py.
  void quantize_outliers(int64_t row) {
    const float* from = column(row / kStripRows, normal_) + row % kStripRows;
    float largest = 0.0f;
    for (int64_t c = 0; c < in_.outliers; ++c) largest = std::max(largest, std::fabs(from[c * kStripRows]));
    const uint16_t half = float_to_half(std::min(std::max(largest / 127.0f, 6e-8f), 65504.0f));
    const float scale = half_to_float(half);
    out_.outlier_scales[first_ + row] = half;
    for (int64_t c = 0; c < in_.outliers; ++c) {
      const float rounded = std::nearbyint(from[c * kStripRows] / scale);
      out_.outliers[(first_ + row) * in_.outliers + c] =
          static_cast<int8_t>(std::min(std::max(rounded, -128.0f), 127.0f));
    }
  }

  const SolverKernels& kernels_;
  const SolveInputs& in_;
  const SolveOptions& options_;
  const SolveOutputs& out_;
  LevelFinder finder_;
  const int count_;
  const int64_t normal_, groups_, width_, strip_;
  int64_t first_ = 0, rows_ = 0;
  Array<float> work_, errors_, panel_, row_;  // work: [strips][columns][16]; errors: [strips][width][16]
  Array<uint8_t> ranks_;
};

}  // namespace

const SolverKernels& solver_kernels(const char* variant) {
#if defined(__x86_64__)
  if (std::strncmp(variant, "avx512-", 7) != 0 && std::strncmp(variant, "avx", 3) == 0) return solver_avx2;
#endif
  (void)variant;
  return solver_scalar;
}

void solve_rows(const SolverKernels& kernels, const SolveInputs& in, const SolveOptions& options,
                const SolveOutputs& out, int threads) {
  if (in.rows == 0) return;
  const int64_t share = round_up((in.rows + threads - 1) / threads, kStripRows);
  const int64_t rows = smaller(kChunkRows, share);
  const int64_t chunks = (in.rows + rows - 1) / rows;
  const int count = static_cast<int>(smaller<int64_t>(threads, chunks));
  if (count <= 1) {
    Chunk chunk(kernels, in, options, out, rows);
    for (int64_t i = 0; i < chunks; ++i) chunk.solve(i * rows, smaller(rows, in.rows - i * rows));
    return;
  }
  bool failed = false;  // an exception must not leave the parallel region
#pragma omp parallel num_threads(count)
  {
    std::unique_ptr<Chunk> chunk;
    try {
      chunk = std::make_unique<Chunk>(kernels, in, options, out, rows);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < chunks; ++i) {
      if (chunk) chunk->solve(i * rows, smaller(rows, in.rows - i * rows));
    }
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace bitwright
