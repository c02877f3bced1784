// See matrix_fill.h.
//
// Work mapping: a task fills 32 rows of the triangle; 8 packed columns (L1) at a time meet tiles of 8 of its rows (L2).
// Squares come from products, |x|^2 + |y|^2 - 2 <x, y>, half the work of differences. The product loses digits where
// the square is small against |x|^2 + |y|^2; those squares are sums of squared differences.
#include "clustering/matrix_fill.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "clustering/matrix_kernels.h"

namespace hiexp::clustering {

namespace {

constexpr size_t kRowsPerTask = 4 * kBlockRows;

// A square above this share of |x|^2 + |y|^2 loses at most two bits to cancellation.
constexpr double kSafeShare = 0.25;

// The rows transposed in blocks of kBlockColumns, 64-byte aligned for the vector loads of the kernels.
struct PackedColumns {
  std::vector<double> storage;
  double* values;
  size_t block_size;

  PackedColumns(const Points& points, ThreadPool& pool) : block_size(points.d * kBlockColumns) {
    const size_t blocks = (points.n + kBlockColumns - 1) / kBlockColumns;
    storage.assign(blocks * block_size + 8, 0.0);
    values = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64 / sizeof(double);
    pool.run(blocks, [&](size_t block) {
      for (size_t i = block * kBlockColumns; i < std::min(points.n, (block + 1) * kBlockColumns); ++i) {
        double* target = values + block * block_size + i % kBlockColumns;
        for (size_t k = 0; k < points.d; ++k) target[k * kBlockColumns] = points.row(i)[k];
      }
    });
  }
};

class Fill {
 public:
  Fill(const Points& points, Entry entry, Triangle<double>& triangle, ThreadPool& pool)
      : points_(points), entry_(entry), triangle_(triangle), columns_(points, pool), norms_(points.n, 0.0) {
    const std::vector<double> zero(points.d, 0.0);
    for (size_t i = 0; i < points.n; ++i) norms_[i] = squared_distance(points.row(i), zero.data(), points.d);
  }

  void rows(size_t first) {
    alignas(64) double values[kBlockRows * kBlockColumns];
    const size_t last = std::min(points_.n, first + kRowsPerTask);
    for (size_t column = 0; column + 1 < last; column += kBlockColumns) {
      for (size_t begin = first; begin < last; begin += kBlockRows) {
        if (column >= begin + kBlockRows) continue;
        tile(begin, column, values);
        for (size_t i = begin; i < std::min(last, begin + kBlockRows); ++i) {
          const size_t width = column < i ? std::min(kBlockColumns, i - column) : 0;
          std::copy_n(values + (i - begin) * kBlockColumns, width, triangle_.row(i) + column);
        }
      }
    }
  }

 private:
  void tile(size_t begin, size_t column, double* values) const {
    constexpr size_t kSize = kBlockRows * kBlockColumns;
    const double* rows[kBlockRows];
    for (size_t r = 0; r < kBlockRows; ++r) rows[r] = points_.row(std::min(begin + r, points_.n - 1));
    const double* panel = columns_.values + column * points_.d;
    if (entry_ == Entry::manhattan) return manhattan_tile(rows, panel, points_.d, values);
    product_tile(rows, panel, points_.d, values);
    alignas(64) double exact[kSize];
    bool have_exact = false;
    for (size_t k = 0; k < kSize; ++k) {
      const size_t i = begin + k / kBlockColumns, j = column + k % kBlockColumns;
      if (i >= points_.n || j >= i) continue;
      const double norms = norms_[i] + norms_[j];
      values[k] = norms - 2.0 * values[k];
      if (values[k] >= kSafeShare * norms) continue;
      if (!have_exact) squared_distance_tile(rows, panel, points_.d, exact);
      have_exact = true;
      values[k] = exact[k];
    }
    if (entry_ != Entry::distance) return;
    for (size_t k = 0; k < kSize; ++k) values[k] = std::sqrt(values[k]);
  }

  const Points& points_;
  Entry entry_;
  Triangle<double>& triangle_;
  PackedColumns columns_;
  std::vector<double> norms_;  // (n,) |x|^2
};

}  // namespace

void fill_distances(const Points& points, Entry entry, Triangle<double>& triangle, ThreadPool& pool, Monitor& monitor) {
  monitor.begin("scan", points.n);
  Fill fill(points, entry, triangle, pool);
  const size_t tasks = (points.n + kRowsPerTask - 1) / kRowsPerTask;
  // The longest rows first, which balances the threads.
  pool.run(tasks, [&](size_t task) {
    fill.rows((tasks - 1 - task) * kRowsPerTask);
    monitor.advance(std::min(kRowsPerTask, points.n - (tasks - 1 - task) * kRowsPerTask));
  });
  monitor.stats.pairs += static_cast<double>(points.n) * static_cast<double>(points.n - 1) / 2.0;
}

}  // namespace hiexp::clustering
