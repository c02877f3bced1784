// Monitor and Stats for the bindings of either module: a Python callable in, a dict out.
#pragma once

#include <pybind11/pybind11.h>

#include "clustering/monitor.h"

namespace hiexp::clustering {

// Honours Ctrl-C and calls progress(stage, done, total) unless it is None. The run it watches must hold no GIL.
inline Monitor::Report python_report(const pybind11::object& progress) {
  const bool quiet = progress.is_none();
  // A handle, since copies of an object would need the GIL; the caller's argument outlives the run.
  return [quiet, callable = pybind11::handle(progress)](const char* stage, size_t done, size_t total) {
    const pybind11::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (!quiet) callable(stage, done, total);
  };
}

inline pybind11::dict stats_dict(const Stats& stats) {
  using namespace pybind11::literals;
  return pybind11::dict("algorithm"_a = stats.algorithm, "rounds"_a = stats.rounds, "passes"_a = stats.passes(),
                        "rescans"_a = stats.rescans, "certified_share"_a = stats.certified_share(),
                        "exact_rows"_a = stats.exact_rows, "duplicates"_a = stats.duplicates, "merges"_a = stats.merges,
                        "matrix_dtype"_a = stats.matrix_dtype, "rechecks"_a = stats.rechecks,
                        "n_threads"_a = stats.n_threads, "seconds"_a = stats.seconds);
}

}  // namespace hiexp::clustering
