// See binding_cpu.h.
#include "clustering/binding_cpu.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "clustering/binding_monitor.h"
#include "clustering/centroid_space.h"
#include "clustering/dendrogram.h"
#include "clustering/matrix_linkage.h"
#include "clustering/points.h"
#include "clustering/rounds.h"
#include "clustering/single.h"

namespace hiexp::clustering {

namespace py = pybind11;

namespace {

std::vector<Merge> merges_of(Points points, Method method, Metric metric, double threshold, ThreadPool& pool,
                             Monitor& monitor) {
  if (points.n < 2) return {};
  if (method == Method::single && metric != Metric::manhattan) {
    monitor.stats.algorithm = "boruvka";
    return spanning_tree(points, metric, threshold, pool, monitor);
  }
  if (!has_centroids(method, metric)) return matrix_linkage(points, method, metric, threshold, pool, monitor);
  std::vector<int32_t> ids = points.ids;
  CentroidSpace space(std::move(points), method, metric, pool, monitor);
  return reciprocal_rounds(space, std::move(ids), threshold, monitor);
}

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  py::array_t<T> array(std::move(shape));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

}  // namespace

template <typename Scalar>
py::tuple linkage(const py::array_t<Scalar, py::array::c_style>& rows, Method method, Metric metric, double threshold,
                  int n_threads, const py::object& progress) {
  if (method == Method::ward && (metric == Metric::sqeuclidean || metric == Metric::manhattan)) {
    throw std::invalid_argument("metric: expected 'euclidean' or 'cosine' with method='ward'");
  }
  const auto n = static_cast<size_t>(rows.shape(0)), d = static_cast<size_t>(rows.shape(1));
  const Scalar* data = rows.data();
  Monitor monitor(python_report(progress));
  monitor.begin("scan", n);
  std::vector<double> z;
  {
    py::gil_scoped_release release;
    ThreadPool pool(n_threads, [&monitor] { monitor.poll(); });
    Points points = prepare_points(data, n, d, metric, pool);
    monitor.stats.n = points.n;
    monitor.stats.duplicates = n - points.n;
    monitor.stats.n_threads = n_threads;
    std::vector<Merge> merges = std::move(points.merges);
    const std::vector<Merge> more = merges_of(std::move(points), method, metric, threshold, pool, monitor);
    merges.insert(merges.end(), more.begin(), more.end());
    z = linkage_matrix(std::move(merges), n, threshold);
    monitor.stats.merges = z.size() / 4;
    monitor.finish(n - 1);
  }
  return py::make_tuple(to_numpy(z, {static_cast<py::ssize_t>(z.size() / 4), 4}), stats_dict(monitor.stats));
}

template <typename Scalar>
py::tuple linkage_precomputed(const py::array_t<Scalar, py::array::c_style>& condensed, size_t n, Method method,
                              double threshold, int n_threads, const py::object& progress) {
  if (n > size_t{1} << 31 || static_cast<size_t>(condensed.size()) != triangle_offset(n)) {
    throw std::invalid_argument("condensed: expected n (n - 1) / 2 distances of n = " + std::to_string(n) +
                                " points, got " + std::to_string(condensed.size()));
  }
  const Scalar* data = condensed.data();
  Monitor monitor(python_report(progress));
  monitor.begin("scan", n);
  std::vector<double> z;
  {
    py::gil_scoped_release release;
    ThreadPool pool(n_threads, [&monitor] { monitor.poll(); });
    monitor.stats.n = n;
    monitor.stats.n_threads = n_threads;
    monitor.begin("scan", n);
    z = linkage_matrix(precomputed_linkage(data, n, method, threshold, pool, monitor), n, threshold);
    monitor.stats.merges = z.size() / 4;
    monitor.finish(n - 1);
  }
  return py::make_tuple(to_numpy(z, {static_cast<py::ssize_t>(z.size() / 4), 4}), stats_dict(monitor.stats));
}

py::array_t<int64_t> cut(const py::array_t<double, py::array::c_style>& z, size_t n_merges, size_t n) {
  const double* rows = z.data();
  std::vector<int64_t> labels;
  {
    py::gil_scoped_release release;
    labels = cut_labels(rows, n_merges, n);
  }
  return to_numpy(labels, {static_cast<py::ssize_t>(n)});
}

template py::tuple linkage(const py::array_t<float, py::array::c_style>&, Method, Metric, double, int,
                           const py::object&);
template py::tuple linkage(const py::array_t<double, py::array::c_style>&, Method, Metric, double, int,
                           const py::object&);

template py::tuple linkage_precomputed(const py::array_t<float, py::array::c_style>&, size_t, Method, double, int,
                                       const py::object&);
template py::tuple linkage_precomputed(const py::array_t<double, py::array::c_style>&, size_t, Method, double, int,
                                       const py::object&);

}  // namespace hiexp::clustering
