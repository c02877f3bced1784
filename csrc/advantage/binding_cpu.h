// hiexp._core's side of binding.h.
#pragma once

#include "advantage/binding.h"
#include "advantage/group_advantage_cpu.h"

namespace hiexp::advantage {

template <typename Real>
void bind_group_advantage(Address rewards, Address labels, const std::string& type, int64_t rows, const Tokens& tokens,
                          const Options& options, Address advantages, Address degenerate, Address mean, Address std,
                          Address count, Address token_advantages, Address notes) {
  const auto batch = make_batch<Real>(rewards, labels, type, rows, tokens);
  const auto result = make_result<Real>(advantages, degenerate, mean, std, count, token_advantages, notes);
  pybind11::gil_scoped_release release;
  group_advantage(batch, options, result);
}

}  // namespace hiexp::advantage
