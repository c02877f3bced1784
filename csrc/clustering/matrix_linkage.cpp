// See matrix_linkage.h.
#include "clustering/matrix_linkage.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "clustering/certified_space.h"
#include "clustering/float_distances.h"
#include "clustering/matrix_fill.h"
#include "clustering/matrix_space.h"
#include "clustering/prim.h"
#include "clustering/rounds.h"

namespace hiexp::clustering {

namespace {

constexpr size_t kPerTask = 1 << 16;

template <typename T>
std::vector<Merge> rounds_over(Triangle<T> triangle, Method method, std::vector<double> sizes, std::vector<int32_t> ids,
                               std::function<double(double)> height, double threshold, ThreadPool& pool,
                               Monitor& monitor) {
  monitor.begin("merge", sizes.size() - 1);
  monitor.stats.matrix_dtype = sizeof(T) == sizeof(float) ? "float32" : "float64";
  MatrixSpace<T> space(std::move(triangle), method, std::move(sizes), ids, std::move(height), pool, monitor);
  return reciprocal_rounds(space, std::move(ids), threshold, monitor);
}

template <typename Scalar>
double largest_of(const Scalar* values, size_t count, ThreadPool& pool) {
  std::vector<double> blocks((count + kPerTask - 1) / kPerTask, 0.0);
  pool.run_ranges(count, kPerTask, [&](size_t begin, size_t end) {
    blocks[begin / kPerTask] = static_cast<double>(*std::max_element(values + begin, values + end));
  });
  return *std::max_element(blocks.begin(), blocks.end());
}

// Distances are divided by 2^exponent, which does not round: under ward so that their squares stay in range, under
// average and weighted only where a sum of sizes times distances could overflow, as that would cost tiny ones digits.
template <typename Scalar>
int exponent_for(Method method, const Scalar* distances, size_t count, ThreadPool& pool) {
  if (method == Method::complete) return 0;
  const double largest = largest_of(distances, count, pool);
  if (largest == 0.0) return 0;
  const int own = std::ilogb(largest) + 1;
  if (method == Method::ward) return own;
  return std::max(0, own - (std::numeric_limits<double>::max_exponent - 34));  // two sizes sum to at most 2^32
}

// SciPy's order backwards is a lower triangle of the points backwards.
template <typename T, typename Scalar>
Triangle<T> reversed_triangle(const Scalar* condensed, size_t n, bool square, int exponent, ThreadPool& pool) {
  Triangle<T> triangle(n);
  const size_t count = triangle_offset(n);
  T* values = triangle.row(0);
  const int half = exponent / 2;  // in two steps, because 2^-exponent itself may overflow
  const auto first = static_cast<T>(std::ldexp(1.0, -half)), second = static_cast<T>(std::ldexp(1.0, half - exponent));
  pool.run_ranges(count, kPerTask, [&](size_t begin, size_t end) {
    for (size_t k = begin; k < end; ++k) {
      const T value = static_cast<T>(condensed[count - 1 - k]) * first * second;
      values[k] = square ? value * value : value;
    }
  });
  return triangle;
}

std::vector<int32_t> reversed_ids(size_t n) {
  std::vector<int32_t> ids(n);
  std::iota(ids.rbegin(), ids.rend(), 0);
  return ids;
}

// Complete depends on the order of distances alone: squares serve it as well, without the roots.
Entry entry_for(Method method, Metric metric) {
  if (metric == Metric::manhattan) return Entry::manhattan;
  return method == Method::complete ? Entry::square : Entry::distance;
}

std::function<double(double)> height_for(Entry entry, Metric metric, int exponent) {
  return [=](double cost) {
    if (entry != Entry::square) return std::ldexp(cost, exponent);
    if (metric == Metric::euclidean) return std::ldexp(std::sqrt(cost), exponent);
    return std::ldexp(metric == Metric::cosine ? cost / 2.0 : cost, 2 * exponent);
  };
}

std::vector<Merge> certified_complete(const Points& points, const std::function<double(double)>& height,
                                      double threshold, ThreadPool& pool, Monitor& monitor) {
  monitor.stats.matrix_dtype = "float32";
  Triangle<float> triangle(points.n);
  FloatDistances distances(points, pool);
  distances.fill(triangle, pool, monitor);
  monitor.begin("merge", points.n - 1);
  CertifiedSpace space(std::move(triangle), std::move(distances), points.sizes, points.ids, height, pool, monitor);
  return reciprocal_rounds(space, points.ids, threshold, monitor);
}

}  // namespace

std::vector<Merge> matrix_linkage(const Points& points, Method method, Metric metric, double threshold,
                                  ThreadPool& pool, Monitor& monitor) {
  monitor.stats.algorithm = "matrix";
  const Entry entry = entry_for(method, metric);
  const std::function<double(double)> height = height_for(entry, metric, points.exponent);
  if (entry == Entry::square) {
    try {
      return certified_complete(points, height, threshold, pool, monitor);
    } catch (const TooClose&) {
    }
  }
  monitor.stats.matrix_dtype = "float64";
  Triangle<double> triangle(points.n);
  fill_distances(points, entry, triangle, pool, monitor);
  if (method != Method::single) {
    return rounds_over(std::move(triangle), method, points.sizes, points.ids, height, threshold, pool, monitor);
  }
  monitor.begin("merge", points.n - 1);
  std::vector<Merge> merges = prim(points.n, [&](size_t i, size_t j) { return triangle.at(i, j); }, pool, monitor);
  for (Merge& merge : merges) {
    const auto a = static_cast<size_t>(merge.a), b = static_cast<size_t>(merge.b);
    merge = {points.ids[a], points.ids[b], height(merge.height)};
  }
  return merges;
}

template <typename Scalar>
std::vector<Merge> precomputed_linkage(const Scalar* condensed, size_t n, Method method, double threshold,
                                       ThreadPool& pool, Monitor& monitor) {
  monitor.stats.algorithm = "matrix";
  monitor.stats.matrix_dtype = sizeof(Scalar) == sizeof(float) ? "float32" : "float64";
  if (n < 2) return {};
  if (method == Method::single) {
    monitor.begin("merge", n - 1);
    const auto length = [&](size_t i, size_t j) {
      return condensed[condensed_offset(std::min(i, j), std::max(i, j), n)];
    };
    return prim(n, length, pool, monitor);
  }
  const bool ward = method == Method::ward;
  const int exponent = exponent_for(method, condensed, triangle_offset(n), pool);
  const std::function<double(double)> height = [=](double cost) {
    return std::ldexp(ward ? std::sqrt(cost) : cost, exponent);
  };
  const std::vector<double> sizes(n, 1.0);
  if (method == Method::complete) {
    return rounds_over(reversed_triangle<Scalar>(condensed, n, false, exponent, pool), method, sizes, reversed_ids(n),
                       height, threshold, pool, monitor);
  }
  return rounds_over(reversed_triangle<double>(condensed, n, ward, exponent, pool), method, sizes, reversed_ids(n),
                     height, threshold, pool, monitor);
}

template std::vector<Merge> precomputed_linkage(const float*, size_t, Method, double, ThreadPool&, Monitor&);
template std::vector<Merge> precomputed_linkage(const double*, size_t, Method, double, ThreadPool&, Monitor&);

}  // namespace hiexp::clustering
