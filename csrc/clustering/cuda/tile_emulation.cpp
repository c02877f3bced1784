// See tile_emulation.h. What an instruction does is written down here once more from the manual ("Matrix fragments for
// mma.m16n8k16" with 16-bit operands, "ldmatrix"); only what is under test comes from tensor_tile.h.
#include "clustering/cuda/tile_emulation.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>

#include "clustering/cuda/tensor_tile.h"

namespace hiexp::clustering {

namespace {

namespace tile = device::tile;

constexpr int kLanes = 32, kSide = 16;

using Matrix = std::array<std::array<float, kSide>, kSide>;
using Register = std::array<float, 2>;  // two halves
using Fragment = std::array<std::array<Register, 4>, kLanes>;

struct Address {
  int row, k;
};

// Register j of lane l holds elements 2 (l % 4) and the next of row l / 4 of matrix j, whose address lane 8 j + l / 4
// gave.
template <typename AddressOf>
Fragment load_matrices(const Matrix& from, const AddressOf& address_of) {
  Fragment fragment;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int j = 0; j < 4; ++j) {
      const Address address = address_of(8 * j + lane / 4);
      for (int e = 0; e < 2; ++e) fragment[lane][j][e] = from[address.row][address.k + lane % 4 * 2 + e];
    }
  }
  return fragment;
}

// Row of register r of operand A is groupID, + 8 for r = 1 and 3; k is 2 threadID_in_group, + 8 for r = 2 and 3. For B
// the column is groupID and k grows by 8 for its second register.
void multiply(const Fragment& a, const Fragment& b, int first_register, float (&d)[kSide][8]) {
  for (auto& row : d) std::fill(std::begin(row), std::end(row), 0.0f);
  float rows[kSide][kSide], columns[8][kSide];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int e = 0; e < 2; ++e) rows[group + r % 2 * 8][2 * thread + e + r / 2 * 8] = a[lane][r][e];
    }
    for (int r = 0; r < 2; ++r) {
      for (int e = 0; e < 2; ++e) columns[group][2 * thread + e + r * 8] = b[lane][first_register + r][e];
    }
  }
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < kSide; ++k) d[i][j] += rows[i][k] * columns[j][k];
    }
  }
}

Matrix to_matrix(const pybind11::array_t<float, pybind11::array::c_style>& array) {
  if (array.ndim() != 2 || array.shape(0) != kSide || array.shape(1) != kSide) {
    throw std::invalid_argument("expected shape (16, 16)");
  }
  Matrix matrix;
  for (int i = 0; i < kSide; ++i) {
    for (int k = 0; k < kSide; ++k) matrix[i][k] = array.at(i, k);
  }
  return matrix;
}

}  // namespace

pybind11::array_t<float> emulated_tile(const pybind11::array_t<float, pybind11::array::c_style>& a,
                                       const pybind11::array_t<float, pybind11::array::c_style>& b) {
  const Fragment rows =
      load_matrices(to_matrix(a), [](int lane) { return Address{tile::a_row(lane), tile::a_k(lane)}; });
  const Fragment columns =
      load_matrices(to_matrix(b), [](int lane) { return Address{tile::b_column(lane), tile::b_k(lane)}; });
  pybind11::array_t<float> product({kSide, kSide});
  auto out = product.mutable_unchecked<2>();
  for (int n = 0; n < 2; ++n) {
    float d[kSide][8];
    multiply(rows, columns, 2 * n, d);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        // The manual's place of sum i: row groupID, + 8 for i >= 2; column 2 threadID_in_group + i % 2.
        const float sum = d[lane / 4 + (i < 2 ? 0 : 8)][lane % 4 * 2 + (i & 1)];
        out(tile::c_row(lane, i), 8 * n + tile::c_column(lane, i)) = sum;
      }
    }
  }
  return product;
}

}  // namespace hiexp::clustering
