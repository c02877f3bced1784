// Linkage over a distance matrix: of points without a centroid form, and of distances the caller brings.
#pragma once

#include <vector>

#include "clustering/method.h"
#include "clustering/monitor.h"
#include "clustering/points.h"
#include "clustering/thread_pool.h"
#include "clustering/triangle.h"

namespace hiexp::clustering {

// Merges of complete, or of average, weighted, single over a metric without a centroid form. Complete over
// all but manhattan needs 2 n^2 bytes where float32 can tell the distances apart, the others 4 n^2.
std::vector<Merge> matrix_linkage(const Points& points, Method method, Metric metric, double threshold,
                                  ThreadPool& pool, Monitor& monitor);

// Number of elements before the distance of i and j, i < j < n, in SciPy's condensed order.
inline size_t condensed_offset(size_t i, size_t j, size_t n) {
  return triangle_offset(n) - triangle_offset(n - i) + (j - i - 1);
}

// Merges of `condensed` (n (n - 1) / 2,), which is only read. Ward expects euclidean distances, as in SciPy: d(A, B)^2
// is Lance and Williams' update of the squares. Single needs no matrix of its own, the others 4 n^2 bytes; complete
// over float32 half of that.
template <typename Scalar>
std::vector<Merge> precomputed_linkage(const Scalar* condensed, size_t n, Method method, double threshold,
                                       ThreadPool& pool, Monitor& monitor);

}  // namespace hiexp::clustering
