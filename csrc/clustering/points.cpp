// See points.h.
//
// Shift and scale are exact. A coordinate is shifted only where all its values lie within a factor of two of the shift,
// where subtraction does not round (Sterbenz); elsewhere the values are no larger than twice their spread, so means of
// clusters keep their digits without a shift. Equal rows merge at height 0 first: the mean of equal rows may round to
// something else.
#include "clustering/points.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "clustering/kernels.h"
#include "row_hash.h"

namespace hiexp::clustering {

namespace {

void normalise(double* row, size_t d, size_t index) {
  double largest = 0.0;
  for (size_t k = 0; k < d; ++k) largest = std::max(largest, std::abs(row[k]));
  if (largest == 0.0) refuse_zero_row(index);
  double squares = 0.0;  // of the row over its largest entry: no overflow, no underflow
  for (size_t k = 0; k < d; ++k) squares += (row[k] / largest) * (row[k] / largest);
  const double root = std::sqrt(squares);
  for (size_t k = 0; k < d; ++k) row[k] = row[k] / largest / root;
}

template <typename Scalar>
void load_row(const Scalar* source, size_t d, Metric metric, size_t index, double* row) {
  for (size_t k = 0; k < d; ++k) {
    row[k] = static_cast<double>(source[k]) + 0.0;  // -0.0 + 0.0 = 0.0, so that equal rows have equal bytes
    if (!std::isfinite(row[k])) refuse_non_finite(row[k], index, k);
  }
  if (metric == Metric::cosine) normalise(row, d, index);
}

void collapse_duplicates(Points& points, ThreadPool& pool) {
  const size_t n = points.n, row_bytes = points.d * sizeof(double);
  std::vector<uint64_t> hashes(n);
  pool.run_ranges(n, 256, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) hashes[i] = hash_row(points.row(i), points.d);
  });
  std::unordered_multimap<uint64_t, size_t> seen;
  seen.reserve(n);
  size_t kept = 0;
  for (size_t i = 0; i < n; ++i) {
    const auto [begin, end] = seen.equal_range(hashes[i]);
    const auto twin = std::find_if(begin, end, [&](const auto& entry) {
      return std::memcmp(points.row(entry.second), points.row(i), row_bytes) == 0;
    });
    if (twin != end) {
      points.merges.push_back({points.ids[twin->second], static_cast<int32_t>(i), 0.0});
      points.sizes[twin->second] += 1.0;
      continue;
    }
    if (kept != i) std::memcpy(points.rows.data() + kept * points.d, points.row(i), row_bytes);
    points.ids.push_back(static_cast<int32_t>(i));
    points.sizes.push_back(1.0);
    seen.emplace(hashes[i], kept++);
  }
  points.n = kept;
  points.rows.resize(kept * points.d);
}

// Folds fixed blocks of rows by fold(block's accumulator, row), so that results do not depend on the threads.
template <typename Accumulator, typename Fold>
std::vector<Accumulator> fold_blocks(size_t n, const Accumulator& start, ThreadPool& pool, const Fold& fold) {
  constexpr size_t kRows = 512;
  std::vector<Accumulator> blocks((n + kRows - 1) / kRows, start);
  pool.run_ranges(n, kRows, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) fold(blocks[begin / kRows], i);
  });
  return blocks;
}

struct Extent {
  std::vector<double> low, high;

  void include(const double* other_low, const double* other_high) {
    for (size_t k = 0; k < low.size(); ++k) {
      low[k] = std::min(low[k], other_low[k]);
      high[k] = std::max(high[k], other_high[k]);
    }
  }
};

// Smallest and largest value of each coordinate.
Placement placement_of(const Points& points, ThreadPool& pool) {
  const std::vector<double> first(points.row(0), points.row(0) + points.d);
  Extent all{first, first};
  const auto fold = [&](Extent& extent, size_t i) { extent.include(points.row(i), points.row(i)); };
  for (const Extent& extent : fold_blocks(points.n, all, pool, fold)) {
    all.include(extent.low.data(), extent.high.data());
  }
  return place(all.low, all.high);
}

void shift_and_scale(Points& points, ThreadPool& pool) {
  const Placement to = placement_of(points, pool);
  points.exponent = to.exponent;
  pool.run_ranges(points.n, 256, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      double* row = points.rows.data() + i * points.d;
      for (size_t k = 0; k < points.d; ++k) row[k] = (row[k] - to.shift[k]) * to.first * to.second;
    }
  });
}

}  // namespace

void refuse_non_finite(double value, size_t row, size_t column) {
  throw std::invalid_argument("X: expected finite values, got " + std::to_string(value) + " in row " +
                              std::to_string(row) + ", column " + std::to_string(column));
}

void refuse_zero_row(size_t row) {
  throw std::invalid_argument("X: expected nonzero rows with metric='cosine', got all zeros in row " +
                              std::to_string(row));
}

void check_squares(Metric metric, int exponent) {
  // No distance exceeds 2^(exponent + 1), no mean of squares four times that square.
  if (metric != Metric::sqeuclidean || 2 * exponent + 4 <= std::numeric_limits<double>::max_exponent) return;
  throw std::invalid_argument("X: expected rows whose squared distances do not overflow float64, got values around 2^" +
                              std::to_string(exponent));
}

Placement place(const std::vector<double>& low, const std::vector<double>& high) {
  Placement to{std::vector<double>(low.size(), 0.0)};
  double spread = 0.0;
  for (size_t k = 0; k < low.size(); ++k) {
    const double small = std::min(std::abs(low[k]), std::abs(high[k]));
    const double large = std::max(std::abs(low[k]), std::abs(high[k]));
    const bool exact = (low[k] > 0.0 || high[k] < 0.0) && large / 2 <= small;
    if (exact) to.shift[k] = low[k] / 2 + high[k] / 2;
    spread = std::max({spread, std::abs(low[k] - to.shift[k]), std::abs(high[k] - to.shift[k])});
  }
  if (spread == 0.0) return to;
  to.exponent = std::ilogb(spread) + 1 + (std::ilogb(static_cast<double>(low.size())) + 2) / 2;
  const int half = to.exponent / 2;
  to.first = std::ldexp(1.0, -half);
  to.second = std::ldexp(1.0, half - to.exponent);
  return to;
}

template <typename Scalar>
Points prepare_points(const Scalar* data, size_t n, size_t d, Metric metric, ThreadPool& pool) {
  Points points;
  points.n = n;
  points.d = (d + kRowPadding - 1) / kRowPadding * kRowPadding;
  points.rows.assign(n * points.d, 0.0);
  pool.run_ranges(n, 256, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) load_row(data + i * d, d, metric, i, points.rows.data() + i * points.d);
  });
  collapse_duplicates(points, pool);
  if (points.n > 0) shift_and_scale(points, pool);
  check_squares(metric, points.exponent);
  return points;
}

std::vector<double> mean_row(const Points& points, ThreadPool& pool) {
  std::vector<double> mean(points.d, 0.0);
  const auto fold = [&](std::vector<double>& sum, size_t i) {
    for (size_t k = 0; k < points.d; ++k) sum[k] += points.row(i)[k];
  };
  for (const std::vector<double>& sum : fold_blocks(points.n, mean, pool, fold)) {
    for (size_t k = 0; k < points.d; ++k) mean[k] += sum[k] / static_cast<double>(points.n);
  }
  return mean;
}

template Points prepare_points(const float*, size_t, size_t, Metric, ThreadPool&);
template Points prepare_points(const double*, size_t, size_t, Metric, ThreadPool&);

}  // namespace hiexp::clustering
