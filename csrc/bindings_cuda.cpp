// m.def lines only: each binds one operation of csrc/ that runs on a GPU. Importing the module needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "advantage/binding_cuda.h"
#include "clustering/cuda/binding_cuda.h"
#include "clustering/cuda/clusters.h"
#include "cuda_device.h"

namespace py = pybind11;
using namespace pybind11::literals;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Native operations of hiexp on a GPU: device addresses and a stream in.";
  m.attr("version") = HIEXP_VERSION;
  m.attr("toolkit") = HIEXP_CUDA_TOOLKIT;
  m.attr("architectures") = py::str(HIEXP_CUDA_ARCHITECTURES).attr("split")(",");
  m.def("device_count", &hiexp::device_count, "Number of GPUs this process may use, 0 without a driver.");

  namespace advantage = hiexp::advantage;
  py::class_<advantage::Options>(m, "AdvantageOptions", py::module_local())
      .def(py::init(&advantage::make_options), "baseline"_a, "scale"_a, "singleton"_a, "ddof"_a, "eps"_a);
  py::class_<advantage::Tokens>(m, "AdvantageTokens", py::module_local())
      .def(py::init(&advantage::make_tokens), "offsets"_a, "width"_a, "total"_a, "mask"_a, "mask_entry_size"_a,
           "mask_floating"_a);
  m.def("group_advantage_workspace_bytes", &advantage::bind_workspace_bytes, "rows"_a, "tokens"_a, "device"_a);
  m.def("group_advantage_f32", &advantage::bind_group_advantage_cuda<float>, "rewards"_a, "labels"_a, "label_type"_a,
        "rows"_a, "tokens"_a, "options"_a, "advantages"_a, "degenerate"_a, "mean"_a, "std"_a, "count"_a,
        "token_advantages"_a, "notes"_a, "workspace"_a, "device"_a, "stream"_a);
  m.def("group_advantage_f64", &advantage::bind_group_advantage_cuda<double>, "rewards"_a, "labels"_a, "label_type"_a,
        "rows"_a, "tokens"_a, "options"_a, "advantages"_a, "degenerate"_a, "mean"_a, "std"_a, "count"_a,
        "token_advantages"_a, "notes"_a, "workspace"_a, "device"_a, "stream"_a);

  namespace clustering = hiexp::clustering;
  py::enum_<clustering::Method>(m, "LinkageMethod", py::module_local())
      .value("ward", clustering::Method::ward)
      .value("average", clustering::Method::average)
      .value("weighted", clustering::Method::weighted);
  py::enum_<clustering::Metric>(m, "LinkageMetric", py::module_local())
      .value("euclidean", clustering::Metric::euclidean)
      .value("sqeuclidean", clustering::Metric::sqeuclidean)
      .value("cosine", clustering::Metric::cosine);
  py::enum_<clustering::Element>(m, "LinkageElement", py::module_local())
      .value("float16", clustering::Element::float16)
      .value("float32", clustering::Element::float32)
      .value("float64", clustering::Element::float64);
  m.def("linkage_memory", &clustering::bind_linkage_memory, "n"_a, "d"_a, "device"_a);
  m.def("linkage", &clustering::bind_linkage_cuda, "data"_a, "element"_a, "n"_a, "d"_a, "method"_a, "metric"_a,
        "threshold"_a, "workspace"_a, "device"_a, "stream"_a, "progress"_a,
        "tail"_a = clustering::device::kTailClusters);
}
