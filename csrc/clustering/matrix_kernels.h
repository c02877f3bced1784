// Inner loops of the matrix methods, compiled for several x86-64 levels as those of kernels.h.
#pragma once

#include <cstddef>

#include "clustering/kernels.h"

namespace hiexp::clustering {

// For kBlockRows rows x given by pointers and kBlockColumns packed columns y (d, kBlockColumns), 64-byte aligned:
// out[r][c] = <x_r, y_c>, or |x_r - y_c|_1.
void product_tile(const double* const* x, const double* y, size_t d, double* out);
void manhattan_tile(const double* const* x, const double* y, size_t d, double* out);

// out[c] = max(0, q_row + q[c] - 2 dots[c]) for kPanelColumns columns.
void square_row(const float* dots, const float* q, float q_row, float* out);

// First position in [begin, end) whose value is at most `limit`, or at most the limit of that position; `end` if none.
template <typename T>
size_t first_at_most(const T* values, size_t begin, size_t end, T limit);
template <typename T>
size_t first_at_most(const T* values, size_t begin, size_t end, const T* limits);

}  // namespace hiexp::clustering
