// numpy arrays <-> the pointers of row_epilogue.h. The arrays come from hiexp/ops/_logprob_native.py, the only caller,
// which has made their shapes agree; dtype is enforced by the argument types (bound with noconvert).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "scoring/row_epilogue.h"

namespace hiexp::scoring {

template <typename Real>
using Rows = pybind11::array_t<Real>;  // unit stride along the last dimension

template <typename Real>
Tile<Real> make_tile(const Rows<Real>& logits, const std::optional<Rows<Real>>& bias,
                     const std::optional<Rows<Real>>& inverse_temperature, const Rows<int64_t>& target) {
  const auto stride = logits.strides(0) / static_cast<pybind11::ssize_t>(sizeof(Real));
  return {logits.data(),
          logits.shape(0),
          logits.shape(1),
          stride,
          bias ? bias->data() : nullptr,
          inverse_temperature ? inverse_temperature->data() : nullptr,
          target.data()};
}

template <typename Real>
void bind_forward_tile(const Rows<Real>& logits, const std::optional<Rows<Real>>& bias,
                       const std::optional<Rows<Real>>& inverse_temperature, const Rows<int64_t>& target,
                       Rows<Real> state, bool entropy, int n_threads) {
  const auto tile = make_tile(logits, bias, inverse_temperature, target);
  const State<Real> rows{state.mutable_data(0, 0), state.mutable_data(1, 0), state.mutable_data(2, 0),
                         state.mutable_data(3, 0)};
  pybind11::gil_scoped_release release;
  forward_tile(tile, rows, entropy, n_threads);
}

template <typename Real>
void bind_backward_tile(const Rows<Real>& logits, const std::optional<Rows<Real>>& bias,
                        const std::optional<Rows<Real>>& inverse_temperature, const Rows<int64_t>& target,
                        const Rows<Real>& lse, const Rows<Real>& upstream_target, const Rows<Real>& upstream_constant,
                        const std::optional<Rows<Real>>& upstream_entropy, Rows<Real> out, int n_threads) {
  const auto tile = make_tile(logits, bias, inverse_temperature, target);
  const Upstream<Real> upstream{lse.data(), upstream_target.data(), upstream_constant.data(),
                                upstream_entropy ? upstream_entropy->data() : nullptr};
  Real* gradients = out.mutable_data();
  pybind11::gil_scoped_release release;
  backward_tile(tile, upstream, gradients, n_threads);
}

}  // namespace hiexp::scoring
