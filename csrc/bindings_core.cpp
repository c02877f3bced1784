// m.def lines only: each binds one function of csrc/ and releases the GIL there.
#include <pybind11/pybind11.h>

#include "advantage/binding_cpu.h"
#include "clustering/binding_cpu.h"
#include "clustering/cuda/host_emulation.h"
#include "clustering/cuda/tile_emulation.h"
#include "clustering/matrix_linkage.h"
#include "retrieval/binding.h"
#include "scoring/binding.h"

namespace py = pybind11;
using namespace pybind11::literals;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native operations of hiexp on the CPU.";
  m.attr("version") = HIEXP_VERSION;
  m.attr("compiler") = HIEXP_COMPILER;

  namespace advantage = hiexp::advantage;
  py::class_<advantage::Options>(m, "AdvantageOptions", py::module_local())
      .def(py::init(&advantage::make_options), "baseline"_a, "scale"_a, "singleton"_a, "ddof"_a, "eps"_a);
  py::class_<advantage::Tokens>(m, "AdvantageTokens", py::module_local())
      .def(py::init(&advantage::make_tokens), "offsets"_a, "width"_a, "total"_a, "mask"_a, "mask_entry_size"_a,
           "mask_floating"_a);
  m.def("group_advantage_f32", &advantage::bind_group_advantage<float>, "rewards"_a, "labels"_a, "label_type"_a,
        "rows"_a, "tokens"_a, "options"_a, "advantages"_a, "degenerate"_a, "mean"_a, "std"_a, "count"_a,
        "token_advantages"_a, "notes"_a);
  m.def("group_advantage_f64", &advantage::bind_group_advantage<double>, "rewards"_a, "labels"_a, "label_type"_a,
        "rows"_a, "tokens"_a, "options"_a, "advantages"_a, "degenerate"_a, "mean"_a, "std"_a, "count"_a,
        "token_advantages"_a, "notes"_a);

  namespace clustering = hiexp::clustering;
  py::enum_<clustering::Method>(m, "LinkageMethod", py::module_local())
      .value("ward", clustering::Method::ward)
      .value("average", clustering::Method::average)
      .value("weighted", clustering::Method::weighted)
      .value("complete", clustering::Method::complete)
      .value("single", clustering::Method::single);
  py::enum_<clustering::Metric>(m, "LinkageMetric", py::module_local())
      .value("euclidean", clustering::Metric::euclidean)
      .value("sqeuclidean", clustering::Metric::sqeuclidean)
      .value("cosine", clustering::Metric::cosine)
      .value("manhattan", clustering::Metric::manhattan);
  m.def("linkage", &clustering::linkage<float>, "rows"_a.noconvert(), "method"_a, "metric"_a, "threshold"_a,
        "n_threads"_a, "progress"_a);
  m.def("linkage", &clustering::linkage<double>, "rows"_a.noconvert(), "method"_a, "metric"_a, "threshold"_a,
        "n_threads"_a, "progress"_a);
  m.def("linkage_device_logic", &clustering::linkage_device_logic<float>, "rows"_a.noconvert(), "method"_a, "metric"_a,
        "threshold"_a, "tail"_a, "progress"_a);
  m.def("linkage_device_logic", &clustering::linkage_device_logic<double>, "rows"_a.noconvert(), "method"_a, "metric"_a,
        "threshold"_a, "tail"_a, "progress"_a);
  m.def("linkage_device_logic", &clustering::linkage_device_logic<uint16_t>, "rows"_a.noconvert(), "method"_a,
        "metric"_a, "threshold"_a, "tail"_a, "progress"_a);
  m.def("linkage_precomputed", &clustering::linkage_precomputed<float>, "condensed"_a.noconvert(), "n"_a, "method"_a,
        "threshold"_a, "n_threads"_a, "progress"_a);
  m.def("linkage_precomputed", &clustering::linkage_precomputed<double>, "condensed"_a.noconvert(), "n"_a, "method"_a,
        "threshold"_a, "n_threads"_a, "progress"_a);
  m.def("condensed_offset", &clustering::condensed_offset, "i"_a, "j"_a, "n"_a);
  m.def("triangle_offset", &clustering::triangle_offset, "i"_a);
  m.def("emulated_tile", &clustering::emulated_tile, "a"_a, "b"_a);
  m.def("cut_labels", &clustering::cut, "z"_a.noconvert(), "n_merges"_a, "n"_a);

  namespace retrieval = hiexp::retrieval;
  py::class_<retrieval::BoundIndex>(m, "ExactIndex", py::module_local())
      .def(py::init<retrieval::Floats, std::vector<double>, std::optional<retrieval::Floats>,
                    std::optional<retrieval::Floats>, std::vector<size_t>, double>(),
           "rows"_a.noconvert(), "least"_a, "rotation"_a, "edges"_a, "ends"_a, "relative"_a)
      .def("points", &retrieval::BoundIndex::points)
      .def("store", &retrieval::BoundIndex::store, "first"_a, "rotated"_a.noconvert())
      .def("search", &retrieval::BoundIndex::search, "queries"_a.noconvert(), "top_k"_a, "threshold"_a, "hidden"_a,
           "n_threads"_a);

  namespace scoring = hiexp::scoring;
  m.def("forward_tile", &scoring::bind_forward_tile<float>, "logits"_a.noconvert(), "bias"_a.noconvert(),
        "inverse_temperature"_a.noconvert(), "target"_a.noconvert(), "state"_a.noconvert(), "entropy"_a, "n_threads"_a);
  m.def("backward_tile", &scoring::bind_backward_tile<float>, "logits"_a.noconvert(), "bias"_a.noconvert(),
        "inverse_temperature"_a.noconvert(), "target"_a.noconvert(), "lse"_a.noconvert(),
        "upstream_target"_a.noconvert(), "upstream_constant"_a.noconvert(), "upstream_entropy"_a.noconvert(),
        "out"_a.noconvert(), "n_threads"_a);
  m.def("forward_tile", &scoring::bind_forward_tile<double>, "logits"_a.noconvert(), "bias"_a.noconvert(),
        "inverse_temperature"_a.noconvert(), "target"_a.noconvert(), "state"_a.noconvert(), "entropy"_a, "n_threads"_a);
  m.def("backward_tile", &scoring::bind_backward_tile<double>, "logits"_a.noconvert(), "bias"_a.noconvert(),
        "inverse_temperature"_a.noconvert(), "target"_a.noconvert(), "lse"_a.noconvert(),
        "upstream_target"_a.noconvert(), "upstream_constant"_a.noconvert(), "upstream_entropy"_a.noconvert(),
        "out"_a.noconvert(), "n_threads"_a);
}
