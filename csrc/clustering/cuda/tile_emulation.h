// ldmatrix and mma.sync.m16n8k16 as the PTX manual describes them, lane by lane, to check the maps of tensor_tile.h.
#pragma once

#include <pybind11/numpy.h>

namespace hiexp::clustering {

// The product (16, 16) of rows a (16, 16) and columns b (16, 16), both along k, through the addresses that the
// candidate pass gives ldmatrix and the places where it looks for sums.
pybind11::array_t<float> emulated_tile(const pybind11::array_t<float, pybind11::array::c_style>& a,
                                       const pybind11::array_t<float, pybind11::array::c_style>& b);

}  // namespace hiexp::clustering
