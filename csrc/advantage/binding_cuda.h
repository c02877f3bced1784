// hiexp._cuda's side of binding.h.
#pragma once

#include "advantage/binding.h"
#include "advantage/group_advantage_cuda.h"
#include "cuda_device.h"

namespace hiexp::advantage {

inline int64_t bind_workspace_bytes(int64_t rows, int64_t tokens, int device) {
  const DeviceGuard guard(device);
  return workspace_bytes(rows, grid_blocks(rows, tokens));
}

template <typename Real>
void bind_group_advantage_cuda(Address rewards, Address labels, const std::string& type, int64_t rows,
                               const Tokens& tokens, const Options& options, Address advantages, Address degenerate,
                               Address mean, Address std, Address count, Address token_advantages, Address notes,
                               Address workspace, int device, Address stream) {
  const auto batch = make_batch<Real>(rewards, labels, type, rows, tokens);
  const auto result = make_result<Real>(advantages, degenerate, mean, std, count, token_advantages, notes);
  pybind11::gil_scoped_release release;
  const DeviceGuard guard(device);
  group_advantage_cuda(batch, options, result, pointer<void>(workspace), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace hiexp::advantage
