// Entry points of the CPU backend for the bindings: numpy in, numpy out, the GIL released while they compute.
#pragma once

#include <pybind11/numpy.h>

#include "clustering/method.h"

namespace hiexp::clustering {

// Rows (n, d) -> SciPy's linkage matrix (m, 4) with the merges below `threshold`, and a dict of Stats. The caller has
// checked shape and dtype; values are checked here. `progress` is None or progress(stage, done, total); what it raises
// stops the run, as Ctrl-C does.
template <typename Scalar>
pybind11::tuple linkage(const pybind11::array_t<Scalar, pybind11::array::c_style>& rows, Method method, Metric metric,
                        double threshold, int n_threads, const pybind11::object& progress);

// The same for distances in SciPy's condensed order, n (n - 1) / 2 of them, finite and not negative, which the caller
// has checked. They are only read.
template <typename Scalar>
pybind11::tuple linkage_precomputed(const pybind11::array_t<Scalar, pybind11::array::c_style>& condensed, size_t n,
                                    Method method, double threshold, int n_threads, const pybind11::object& progress);

// Linkage matrix (m, 4), m >= n_merges -> labels (n,) after its first n_merges rows.
pybind11::array_t<int64_t> cut(const pybind11::array_t<double, pybind11::array::c_style>& z, size_t n_merges, size_t n);

}  // namespace hiexp::clustering
