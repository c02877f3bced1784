// The GPU's linkage for Python: an address of rows on the device in, SciPy's linkage matrix on the host out. Unchecked
// by nature: hiexp/ops/_clustering_cuda.py is the only caller and owns the checks.
#pragma once

#include <pybind11/numpy.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "clustering/binding_monitor.h"
#include "clustering/cuda/linkage_cuda.h"
#include "clustering/dendrogram.h"
#include "cuda_device.h"

namespace hiexp::clustering {

// (bytes of workspace that n rows of d coordinates need, free bytes) of a device.
inline std::pair<size_t, size_t> bind_linkage_memory(size_t n, size_t d, int device) {
  const pybind11::gil_scoped_release release;
  const DeviceGuard guard(device);
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return {linkage_cuda_bytes(n, d), free};
}

inline pybind11::tuple bind_linkage_cuda(std::uintptr_t data, Element element, size_t n, size_t d, Method method,
                                         Metric metric, double threshold, std::uintptr_t workspace, int device,
                                         std::uintptr_t stream, const pybind11::object& progress, int32_t tail) {
  if (!has_centroids(method, metric)) throw std::invalid_argument("method, metric: no centroid form");
  Monitor monitor(python_report(progress));
  std::vector<double> z;
  {
    const pybind11::gil_scoped_release release;
    const DeviceGuard guard(device);
    const DeviceRows rows{reinterpret_cast<const void*>(data), element, n, d};
    z = linkage_matrix(linkage_cuda(rows, method, metric, threshold, reinterpret_cast<void*>(workspace),
                                    reinterpret_cast<cudaStream_t>(stream), tail, monitor),
                       n, threshold);
    monitor.stats.merges = z.size() / 4;
    monitor.finish(n - 1);
  }
  pybind11::array_t<double> matrix({static_cast<pybind11::ssize_t>(z.size() / 4), pybind11::ssize_t{4}});
  std::copy(z.begin(), z.end(), matrix.mutable_data());
  return pybind11::make_tuple(matrix, stats_dict(monitor.stats));
}

}  // namespace hiexp::clustering
