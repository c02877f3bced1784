// Addresses of arrays and tensors <-> the structs of batch.h, for hiexp._core and hiexp._cuda alike. Unchecked by
// nature: hiexp/ops/_group_advantage_launch.py is the only caller and owns dtype, length, contiguity and device.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "advantage/batch.h"
#include "advantage/options.h"

namespace hiexp::advantage {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Tokens make_tokens(Address offsets, int64_t width, int64_t total, Address mask, int64_t mask_entry_size,
                          bool mask_floating) {
  return {pointer<const int64_t>(offsets), width, total, {pointer<const void>(mask), mask_entry_size, mask_floating}};
}

template <typename Real>
Batch<Real> make_batch(Address rewards, Address labels, const std::string& type, int64_t rows, const Tokens& tokens) {
  return {pointer<const Real>(rewards), {pointer<const void>(labels), label_type(type)}, rows, tokens};
}

template <typename Real>
Result<Real> make_result(Address advantages, Address degenerate, Address mean, Address std, Address count,
                         Address tokens, Address notes) {
  return {pointer<Real>(advantages), pointer<bool>(degenerate), pointer<Real>(mean),    pointer<Real>(std),
          pointer<int32_t>(count),   pointer<Real>(tokens),     pointer<int64_t>(notes)};
}

}  // namespace hiexp::advantage
