// One Cholesky factorization and one triangular inverse instead of two factorizations with an explicit inverse between:
// with J the reversal of the channels, J (H + shift I) J = L L^T gives inverse(H + shift I) = U^T U for U = J L^-1 J.
//
// Both are blocked: what a block of columns contributes to the later ones goes through the update kernel of the solver,
// on strips of 16 rows (of L) or of 16 columns (of its inverse).
#include "factor.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "memory.h"

namespace bitwright {

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kChunkStrips = 16;  // columns of the inverse, in strips, that share one packing of L

class Factorization {
 public:
  Factorization(const SolverKernels& kernels, int64_t size, int threads)
      : kernels_(kernels),
        size_(size),
        padded_(round_up(size, kStripRows)),
        strips_(padded_ / kStripRows),
        threads_(threads),
        lower_(make_array<float>(at(strips_))),
        diagonals_(make_array<float>(blocks() * kBlock * kBlock)) {}

  void read(const float* hessian, float shift);
  bool factorize();
  bool invert(float* upper) const;

 private:
  // L, strip by strip: the columns up to the diagonal, 16 rows each. Padding rows are those of the identity.
  static int64_t at(int64_t strip) { return kStripRows * kStripRows * (strip * (strip + 1) / 2); }
  float* row_strip(int64_t strip, int64_t column) { return lower_.get() + at(strip) + column * kStripRows; }
  const float* row_strip(int64_t strip, int64_t column) const {
    return lower_.get() + at(strip) + column * kStripRows;
  }
  int64_t blocks() const { return (padded_ + kBlock - 1) / kBlock; }
  int64_t width(int64_t start) const { return smaller(kBlock, padded_ - start); }

  bool factorize_diagonal(int64_t start);
  void solve(int64_t start, float* strip) const;
  int64_t pack(int64_t start, int64_t row, float* panel) const;
  bool invert_chunk(int64_t first, int64_t strips, float* work, float* panel, float* upper) const;

  const SolverKernels& kernels_;
  const int64_t size_, padded_, strips_;
  const int threads_;
  Array<float> lower_;
  Array<float> diagonals_;  // [blocks][kBlock][kBlock]: the diagonal blocks of L, transposed
};

// Tile by tile: 16 rows of H lie so far apart that their lines push each other out of the cache.
void Factorization::read(const float* hessian, float shift) {
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 4)
  for (int64_t s = 0; s < strips_; ++s) {
    for (int64_t tile = 0; tile <= s; ++tile) {
      float* to = row_strip(s, tile * kStripRows);
      for (int64_t r = 0; r < kStripRows; ++r) {
        const int64_t i = s * kStripRows + r;
        for (int64_t c = 0; c < kStripRows; ++c) {
          const int64_t j = tile * kStripRows + c;
          // Above the diagonal whatever is finite will do.
          to[c * kStripRows + r] = i >= size_ || i < j ? static_cast<float>(i == j)
                                                       : hessian[(size_ - 1 - i) * size_ + size_ - 1 - j];
        }
        if (tile == s && i < size_) to[r * kStripRows + r] += shift;
      }
    }
  }
}

bool Factorization::factorize_diagonal(int64_t start) {
  const int64_t size = width(start);
  float* d = diagonals_.get() + start * kBlock;
  std::memset(d, 0, kBlock * kBlock * sizeof(float));
  for (int64_t i = 0; i < size; ++i) {
    const int64_t s = (start + i) / kStripRows, r = (start + i) % kStripRows;
    for (int64_t j = 0; j <= i; ++j) d[j * kBlock + i] = row_strip(s, start + j)[r];
  }
  for (int64_t k = 0; k < size; ++k) {
    float* row = d + k * kBlock;
    if (!(row[k] > 0.0f) || std::isinf(row[k])) return false;
    const float root = std::sqrt(row[k]);
    for (int64_t j = k; j < size; ++j) row[j] /= root;
    row[k] = root;
    for (int64_t i = k + 1; i < size; ++i) {
      const float factor = row[i];
      float* later = d + i * kBlock;
      for (int64_t j = i; j < size; ++j) later[j] -= factor * row[j];
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    const int64_t s = (start + i) / kStripRows, r = (start + i) % kStripRows;
    for (int64_t j = 0; j <= i; ++j) row_strip(s, start + j)[r] = d[j * kBlock + i];
  }
  return true;
}

// x with x L_bb^T = the block of columns that begins here, in place: block-tri feedback of what one level, 0, leaves.
void Factorization::solve(int64_t start, float* strip) const {
  constexpr float zero[kStripRows] = {};
  uint8_t ranks[kBlock * kStripRows];
  kernels_.assign(Feedback::block_triangular,
                  Block{width(start), strip, zero, 1, diagonals_.get() + start * kBlock, kBlock, ranks, strip});
}

// L[row.., block]^T as the update kernel reads it; how many rows there are.
int64_t Factorization::pack(int64_t start, int64_t row, float* panel) const {
  const int64_t rows = smaller(kPanel, padded_ - row);
  for (int64_t k = 0; k < width(start); ++k) {
    for (int64_t c = 0; c < rows; c += kStripRows) {
      std::memcpy(panel + k * kPanel + c, row_strip((row + c) / kStripRows, start + k), kStripRows * sizeof(float));
    }
    std::fill(panel + k * kPanel + rows, panel + (k + 1) * kPanel, 0.0f);
  }
  return rows;
}

bool Factorization::factorize() {
  const Array<float> panels = make_array<float>(threads_ * kBlock * kPanel);
  for (int64_t start = 0; start < padded_; start += kBlock) {
    if (!factorize_diagonal(start)) return false;
    const int64_t stop = start + width(start), first = stop / kStripRows;
    int next = 0;
#pragma omp parallel num_threads(threads_)
    {
      int mine;
#pragma omp atomic capture
      mine = next++;
      float* panel = panels.get() + mine * kBlock * kPanel;
#pragma omp for schedule(dynamic, 4)
      for (int64_t s = first; s < strips_; ++s) solve(start, row_strip(s, start));
#pragma omp for schedule(dynamic)
      for (int64_t row = stop; row < padded_; row += kPanel) {
        pack(start, row, panel);
        for (int64_t s = row / kStripRows; s < strips_; ++s) {
          const int64_t columns = smaller(kPanel, (s + 1) * kStripRows - row);
          kernels_.update(row_strip(s, start), stop - start, panel, columns, row_strip(s, row));
        }
      }
    }
  }
  return true;
}

// Columns of X = L^-1 from `first` on, L X = I from top to bottom; work [strips][padded - first][16]. Whether all of
// them are finite.
bool Factorization::invert_chunk(int64_t first, int64_t strips, float* work, float* panel, float* upper) const {
  const int64_t stride = (padded_ - first) * kStripRows;
  std::memset(work, 0, static_cast<size_t>(strips * stride) * sizeof(float));
  for (int64_t c = 0; c < strips * kStripRows; ++c) {
    work[c / kStripRows * stride + c * kStripRows + c % kStripRows] = 1.0f;
  }
  float zero = 0.0f;  // 0 times a number that is not finite is none
  for (int64_t start = first; start < padded_; start += kBlock) {
    const int64_t stop = start + width(start);
    for (int64_t s = 0; s < strips; ++s) {
      float* block = work + s * stride + (start - first) * kStripRows;
      solve(start, block);
      for (int64_t i = start; i < smaller(stop, size_); ++i) {
        for (int64_t r = 0; r < kStripRows; ++r) {
          const int64_t c = first + s * kStripRows + r;
          const float value = block[(i - start) * kStripRows + r];
          zero += 0.0f * value;
          if (c <= i) upper[(size_ - 1 - i) * size_ + size_ - 1 - c] = value;
        }
      }
    }
    for (int64_t row = stop; row < padded_; row += kPanel) {
      const int64_t rows = pack(start, row, panel);
      for (int64_t s = 0; s < strips; ++s) {
        float* strip = work + s * stride;
        kernels_.update(strip + (start - first) * kStripRows, stop - start, panel, rows,
                        strip + (row - first) * kStripRows);
      }
    }
  }
  return zero == 0.0f;
}

bool Factorization::invert(float* upper) const {
  std::memset(upper, 0, static_cast<size_t>(size_ * size_) * sizeof(float));
  const int64_t chunk = kChunkStrips * kStripRows;
  const Array<float> works = make_array<float>(threads_ * chunk * padded_);
  const Array<float> panels = make_array<float>(threads_ * kBlock * kPanel);
  int next = 0;
  bool finite = true;
#pragma omp parallel num_threads(threads_)
  {
    int mine;
#pragma omp atomic capture
    mine = next++;
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < padded_; first += chunk) {
      const int64_t strips = smaller(chunk, padded_ - first) / kStripRows;
      float* work = works.get() + mine * chunk * padded_;
      if (!invert_chunk(first, strips, work, panels.get() + mine * kBlock * kPanel, upper)) {
#pragma omp atomic write
        finite = false;
      }
    }
  }
  return finite;
}

}  // namespace

bool upper_factor(const SolverKernels& kernels, const float* hessian, int64_t size, float shift, float* upper,
                  int threads) {
  Factorization factorization(kernels, size, std::max(threads, 1));
  factorization.read(hessian, shift);
  return factorization.factorize() && factorization.invert(upper);
}

}  // namespace bitwright
