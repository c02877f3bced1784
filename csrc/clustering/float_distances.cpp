// See float_distances.h. The error bound is that of panels.cpp: with squared norms shrunk by kSlack, q_x + q_y - 2 <x,
// y> is a lower bound, and twice what was taken off lies above.
//
// Work mapping: a task fills 48 rows of the triangle; a panel of 48 columns (L2) meets tiles of 8 of its rows (L1).
#include "clustering/float_distances.h"

#include <algorithm>

#include "clustering/matrix_kernels.h"

namespace hiexp::clustering {

namespace {

constexpr size_t kRowsPerTask = 6 * kTileRows;
constexpr double kUnit = 1.0 / (1 << 24);
constexpr double kUnderflow = 1e-30;

// Up to this many pairs it is cheaper to compute all in float64 than to pack tiles.
constexpr size_t kFewPairs = 96;

double slack(size_t d) { return (static_cast<double>(d) + 32.0) * 1.01 * kUnit; }

float* align(std::vector<float>& storage, size_t count) {
  storage.assign(count + 16, 0.0f);
  const size_t past = reinterpret_cast<uintptr_t>(storage.data()) % 64;
  return storage.data() + (64 - past) % 64 / sizeof(float);
}

}  // namespace

FloatDistances::FloatDistances(const Points& points, ThreadPool& pool) : points_(points), widths_(points.n) {
  const size_t d = points_.d, padded = (points_.n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  panels_ = align(storage_, padded * d);
  q_.assign(padded, 0.0f);
  const std::vector<double> centre = mean_row(points_, pool);
  pool.run_ranges(points_.n, kPanelColumns, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      float* target = panels_ + begin * d + (i - begin);
      double squares = 0.0;
      for (size_t k = 0; k < d; ++k) {
        const double value = points_.row(i)[k] - centre[k];
        squares += value * value;
        target[k * kPanelColumns] = static_cast<float>(value);
      }
      q_[i] = static_cast<float>(squares * (1.0 - slack(d)) - kUnderflow);
      widths_[i] = 2.02 * (squares * slack(d) + kUnderflow);
    }
  });
}

void FloatDistances::fill(Triangle<float>& triangle, ThreadPool& pool, Monitor& monitor) const {
  const size_t n = points_.n, tasks = (n + kRowsPerTask - 1) / kRowsPerTask;
  monitor.begin("scan", n);
  // The longest rows first, which balances the threads.
  pool.run(tasks, [&](size_t task) {
    const size_t first = (tasks - 1 - task) * kRowsPerTask;
    fill_block(first, triangle);
    monitor.advance(std::min(kRowsPerTask, n - first));
  });
  monitor.stats.pairs += static_cast<double>(n) * static_cast<double>(n - 1) / 2.0;
}

// Transposed in tiles of `width` points: (tiles, d, width).
void FloatDistances::pack(const int32_t* points, size_t count, size_t width, float* out) const {
  for (size_t p = 0; p < count; ++p) {
    const auto i = static_cast<size_t>(points[p]);
    const float* source = panels_ + i / kPanelColumns * kPanelColumns * points_.d + i % kPanelColumns;
    float* target = out + p / width * width * points_.d + p % width;
    for (size_t k = 0; k < points_.d; ++k) target[k * width] = source[k * kPanelColumns];
  }
}

void FloatDistances::fill_block(size_t first, Triangle<float>& triangle) const {
  const size_t d = points_.d, last = std::min(points_.n, first + kRowsPerTask);
  std::vector<int32_t> rows;
  for (size_t i = first; i < last; ++i) rows.push_back(static_cast<int32_t>(i));
  std::vector<float> packed(kRowsPerTask * d, 0.0f);
  pack(rows.data(), rows.size(), kTileRows, packed.data());
  alignas(64) float dots[kTileRows * kPanelColumns];
  alignas(64) float keys[kPanelColumns];
  for (size_t column = 0; column + 1 < last; column += kPanelColumns) {
    for (size_t begin = first; begin < last; begin += kTileRows) {
      if (column >= begin + kTileRows) continue;
      const size_t count = std::min(kTileRows, last - begin);
      dot_tile(packed.data() + (begin - first) * d, panels_ + column * d, d, count, dots);
      for (size_t i = begin; i < begin + count; ++i) {
        square_row(dots + (i - begin) * kPanelColumns, q_.data() + column, q_[i], keys);
        const size_t width = column < i ? std::min(kPanelColumns, i - column) : 0;
        std::copy_n(keys, width, triangle.row(i) + column);
      }
    }
  }
}

double FloatDistances::farthest(const std::vector<int32_t>& a, const std::vector<int32_t>& b, double floor,
                                ThreadPool* pool) const {
  double best = 0.0;
  if (a.size() * b.size() <= kFewPairs) {
    for (const int32_t i : a) {
      for (const int32_t j : b) {
        best = std::max(best, squared_distance(points_.row(static_cast<size_t>(i)), points_.row(static_cast<size_t>(j)),
                                               points_.d));
      }
    }
    return best;
  }
  std::vector<float> storage;
  float* panels = align(storage, (b.size() + kPanelColumns - 1) / kPanelColumns * kPanelColumns * points_.d);
  pack(b.data(), b.size(), kPanelColumns, panels);
  const size_t blocks = (a.size() + kRowsPerTask - 1) / kRowsPerTask;
  std::vector<double> found(blocks);
  const auto body = [&](size_t block) {
    const size_t begin = block * kRowsPerTask, count = std::min(kRowsPerTask, a.size() - begin);
    found[block] = farthest_of_block(a.data() + begin, count, b, panels, floor);
  };
  if (pool != nullptr) {
    pool->run(blocks, body);
  } else {
    for (size_t block = 0; block < blocks; ++block) body(block);
  }
  return *std::max_element(found.begin(), found.end());
}

double FloatDistances::farthest_of_block(const int32_t* a, size_t count, const std::vector<int32_t>& b,
                                         const float* panels, double floor) const {
  const size_t d = points_.d;
  std::vector<float> packed(kRowsPerTask * d, 0.0f);
  pack(a, count, kTileRows, packed.data());
  alignas(64) float dots[kTileRows * kPanelColumns];
  double best = 0.0;
  for (size_t column = 0; column < b.size(); column += kPanelColumns) {
    const size_t width = std::min(kPanelColumns, b.size() - column);
    for (size_t begin = 0; begin < count; begin += kTileRows) {
      const size_t rows = std::min(kTileRows, count - begin);
      dot_tile(packed.data() + begin * d, panels + column * d, d, rows, dots);
      for (size_t r = 0; r < rows; ++r) {
        const auto i = static_cast<size_t>(a[begin + r]);
        for (size_t c = 0; c < width; ++c) {
          const auto j = static_cast<size_t>(b[column + c]);
          const double key = static_cast<double>(q_[i] + q_[j] - 2.0f * dots[r * kPanelColumns + c]);
          if (key + widths_[i] + widths_[j] < std::max(floor, best)) continue;
          best = std::max(best, squared_distance(points_.row(i), points_.row(j), d));
        }
      }
    }
  }
  return best;
}

}  // namespace hiexp::clustering
