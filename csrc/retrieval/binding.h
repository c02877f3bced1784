// numpy arrays <-> ExactIndex. The arrays come from hiexp/experience/index.py, the only caller, which has made their
// shapes agree; dtype is enforced by the argument types (bound with noconvert).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "retrieval/exact_index.h"

namespace hiexp::retrieval {

using Floats = pybind11::array_t<float, pybind11::array::c_style>;

// The index and the rows that it reads.
struct BoundIndex {
  BoundIndex(Floats rows_of_index, std::vector<double> least, const std::optional<Floats>& rotation,
             const std::optional<Floats>& edges, std::vector<size_t> ends, double relative)
      : rows(std::move(rows_of_index)),
        index(rows.data(), static_cast<size_t>(rows.shape(0)), static_cast<size_t>(rows.shape(1)), std::move(least),
              {copy(rotation), copy(edges), std::move(ends), relative}) {}

  static std::vector<float> copy(const std::optional<Floats>& values) {
    return values ? std::vector<float>(values->data(), values->data() + values->size()) : std::vector<float>();
  }

  pybind11::array_t<int64_t> points() const {
    return pybind11::array_t<int64_t>(static_cast<pybind11::ssize_t>(index.points().size()), index.points().data());
  }

  void store(size_t first, const Floats& rotated) {
    const float* data = rotated.data();
    const auto count = static_cast<size_t>(rotated.shape(0));
    pybind11::gil_scoped_release release;
    index.store(first, data, count);
  }

  // Per query (rows of `queries`) a list of (row, score), best first.
  std::vector<std::vector<std::pair<int64_t, double>>> search(const Floats& queries, size_t top_k,
                                                              std::optional<double> threshold,
                                                              const std::vector<std::vector<int64_t>>& hidden,
                                                              int n_threads) const {
    const float* data = queries.data();
    const auto d = static_cast<size_t>(queries.shape(1));
    std::vector<std::vector<std::pair<int64_t, double>>> result(hidden.size());
    pybind11::gil_scoped_release release;
    for (size_t i = 0; i < hidden.size(); ++i) {
      for (const Found& found : index.search(data + i * d, top_k, threshold, hidden[i], n_threads)) {
        result[i].emplace_back(found.row, found.score);
      }
    }
    return result;
  }

  Floats rows;
  ExactIndex index;
};

}  // namespace hiexp::retrieval
