// The input as every backend wants it: float64 rows, zero-padded, normalised (cosine), shifted, scaled, without
// duplicates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clustering/method.h"
#include "clustering/thread_pool.h"

namespace hiexp::clustering {

struct Points {
  size_t n = 0;               // distinct rows
  size_t d = 0;               // coordinates of a row, padding included
  int exponent = 0;           // distances of the input = 2^exponent times distances of the rows
  std::vector<double> rows;   // (n, d)
  std::vector<double> sizes;  // (n,) how many input rows are equal to this one
  std::vector<int32_t> ids;   // (n,) first input row that equals this one
  std::vector<Merge> merges;  // duplicates: merges at height 0

  const double* row(size_t i) const { return rows.data() + i * d; }
};

// Where rows go before anything is computed, exactly: (row - shift) * first * second.
struct Placement {
  std::vector<double> shift;  // (d,) the middle of a coordinate's values where subtracting it does not round, else 0
  int exponent = 0;           // 2^exponent is at least the largest norm, so squares stay inside the float32 range
  double first = 1.0, second = 1.0;  // their product is 2^-exponent, which itself may overflow
};

// From the smallest and largest value of each coordinate (d,).
Placement place(const std::vector<double>& low, const std::vector<double>& high);

// The errors of every backend about values, each an std::invalid_argument.
[[noreturn]] void refuse_non_finite(double value, size_t row, size_t column);
[[noreturn]] void refuse_zero_row(size_t row);
// Refuses a scale 2^exponent whose squared distances may overflow, where they are the distances.
void check_squares(Metric metric, int exponent);

// Throws std::invalid_argument for a NaN, an infinity, or a zero row under cosine, naming the row; for squared
// distances that may overflow under sqeuclidean.
template <typename Scalar>
Points prepare_points(const Scalar* data, size_t n, size_t d, Metric metric, ThreadPool& pool);

// Mean of the distinct rows (d,).
std::vector<double> mean_row(const Points& points, ThreadPool& pool);

}  // namespace hiexp::clustering
