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

// Throws std::invalid_argument for a NaN, an infinity, or a zero row under cosine, naming the row; for squared
// distances that may overflow under sqeuclidean.
template <typename Scalar>
Points prepare_points(const Scalar* data, size_t n, size_t d, Metric metric, ThreadPool& pool);

// Mean of the distinct rows (d,).
std::vector<double> mean_row(const Points& points, ThreadPool& pool);

}  // namespace hiexp::clustering
