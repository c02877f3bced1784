// See host_emulation.h.
#include "clustering/cuda/host_emulation.h"

#include <cstring>
#include <vector>

#include "clustering/binding_monitor.h"
#include "clustering/cuda/driver.h"
#include "clustering/dendrogram.h"
#include "clustering/kernels.h"

namespace hiexp::clustering {

namespace py = pybind11;

namespace {

using namespace device;

struct Alone {
  int rank() const { return 0; }
  int size() const { return 1; }
  bool lead() const { return true; }
  void sync() const {}
  double sum(double value) const { return value; }
  double max(double value) const { return value; }
  template <typename Order>
  Nearest least(const Nearest& mine, const Order&) const {
    return mine;
  }
  double squared_distance(const double* x, const double* y, int d) const {
    return clustering::squared_distance(x, y, static_cast<size_t>(d));
  }
};

class HostBackend {
 public:
  template <typename T>
  void read(T* to, const T* from, int64_t count) const {
    std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(count) * sizeof(T));
  }
  template <typename T>
  void write(T* to, const T* from, int64_t count) const {
    std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(count) * sizeof(T));
  }
  template <typename T>
  void zero(T* to, int64_t count) const {
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(T));
  }
  void wait() const {}

  template <typename Step>
  void each(const Span& span, const Step& step) const {
    const int64_t end = span.end();
    for (int64_t i = span.begin(); i < end; ++i) step(i);
  }
  template <typename Step>
  void teams(const Span& span, const Step& step) const {
    const int64_t end = span.end();
    for (int64_t i = span.begin(); i < end; ++i) step(Alone{}, i);
  }
  template <typename Step>
  void octets(const Span& span, int per_item, const Step& step) const {
    const int64_t end = span.end() * per_item;
    for (int64_t i = span.begin() * per_item; i < end; ++i) step(Alone{}, i);
  }

  void tail(const Clusters& c) const { finish_by_chain(c, Alone{}); }

  void scan_bounds(const Clusters& c, const int32_t* rows, const Span& span) const {
    std::vector<float> mine(static_cast<size_t>(c.depth));
    for (int64_t w = span.begin(); w < span.end(); ++w) {
      const int32_t row = rows[w];
      for (int k = 0; k < c.depth; ++k) mine[static_cast<size_t>(k)] = float_of(c.halves[int64_t{row} * c.depth + k]);
      select<Approximate>(c, row, [&](int32_t slot) {
        float dot = 0.0f;
        for (int k = 0; k < c.depth; ++k) {
          dot += mine[static_cast<size_t>(k)] * float_of(c.halves[int64_t{slot} * c.depth + k]);
        }
        return cost_bound(dot, c.bounds[row], c.bounds[slot], c.method == Method::ward);
      });
    }
  }

  void scan_costs(const Clusters& c, const int32_t* rows, const Span& span) const {
    for (int64_t w = span.begin(); w < span.end(); ++w) {
      const int32_t row = rows[w];
      select<Exact>(c, row, [&](int32_t slot) {
        return c.cost(row, slot, Alone{}.squared_distance(c.centroid(row), c.centroid(slot), c.d));
      });
    }
  }

 private:
  template <typename Candidate, typename Cost>
  static void select(const Clusters& c, int32_t row, const Cost& cost) {
    std::vector<Candidate> best(kKeep, no_candidate<Candidate>());
    for (int32_t p = 0; p < c.listed; ++p) {
      const int32_t slot = c.columns[p];
      if (slot == row || c.states[slot] == State::empty) continue;
      const Candidate candidate{cost(slot), slot};
      if (!comes_before(candidate, best.back(), row)) continue;
      const auto before = [&](const Candidate& left, const Candidate& right) { return comes_before(left, right, row); };
      best.insert(std::upper_bound(best.begin(), best.end(), candidate, before), candidate);
      best.pop_back();
    }
    c.counts[row] = 0;
    for (int x = 0; x < kKeep; ++x) {
      store(c, row, x, best[static_cast<size_t>(x)]);
      if (x < kList && best[static_cast<size_t>(x)].slot >= 0) ++c.counts[row];
    }
  }
};

template <typename Scalar>
const Scalar* values(const Scalar* data) {
  return data;
}
const Half* values(const uint16_t* data) { return reinterpret_cast<const Half*>(data); }

}  // namespace

template <typename Scalar>
py::tuple linkage_device_logic(const py::array_t<Scalar, py::array::c_style>& rows, Method method, Metric metric,
                               double threshold, int32_t tail, const py::object& progress) {
  const auto n = static_cast<size_t>(rows.shape(0)), d = static_cast<size_t>(rows.shape(1));
  if (!runs_on_device(method, metric)) throw std::invalid_argument("method, metric: no centroid form");
  if (tail < 0) throw std::invalid_argument("tail: expected a number of clusters");
  const Scalar* data = rows.data();
  Monitor monitor(python_report(progress));
  std::vector<double> z;
  {
    py::gil_scoped_release release;
    Clusters clusters{};
    std::vector<uint64_t> memory(lay_out(clusters, nullptr, n, d, 1, tail) / sizeof(uint64_t));
    lay_out(clusters, memory.data(), n, d, 1, tail);
    HostBackend backend;
    Driver<HostBackend> driver(backend, clusters, method, metric, threshold, monitor);
    z = linkage_matrix(driver.run(values(data), static_cast<int64_t>(d)), n, threshold);
    monitor.stats.merges = z.size() / 4;
    monitor.finish(n - 1);
  }
  py::array_t<double> matrix({static_cast<py::ssize_t>(z.size() / 4), py::ssize_t{4}});
  std::copy(z.begin(), z.end(), matrix.mutable_data());
  return py::make_tuple(matrix, stats_dict(monitor.stats));
}

#define HIEXP_INSTANTIATE(Scalar)                                                                                 \
  template py::tuple linkage_device_logic(const py::array_t<Scalar, py::array::c_style>&, Method, Metric, double, \
                                          int32_t, const py::object&);
HIEXP_INSTANTIATE(float)
HIEXP_INSTANTIATE(double)
HIEXP_INSTANTIATE(uint16_t)

}  // namespace hiexp::clustering
