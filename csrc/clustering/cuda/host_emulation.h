// The device's clustering with plain loops in place of kernels: the same steps, the same half-precision rounding, the
// same bounds. For tests on machines without a GPU; single-threaded and slow.
#pragma once

#include <pybind11/numpy.h>

#include "clustering/method.h"

namespace hiexp::clustering {

// As linkage() in binding_cpu.h, for the methods the device has; uint16 rows are the bits of float16 values. `tail`:
// the number of clusters that the chain finishes, 0 for none.
template <typename Scalar>
pybind11::tuple linkage_device_logic(const pybind11::array_t<Scalar, pybind11::array::c_style>& rows, Method method,
                                     Metric metric, double threshold, int32_t tail, const pybind11::object& progress);

}  // namespace hiexp::clustering
