// Inner loops over coordinates. Compiled for several x86-64 levels in one binary; the loader picks one, so wheels stay
// portable. All sums run in a fixed order, so a value depends on its operands alone: never on threads or blocking.
#pragma once

#include <cstddef>

namespace hiexp::clustering {

constexpr size_t kPanelColumns = 16;  // columns of a packed float32 panel: one AVX-512 register, two of AVX2
constexpr size_t kTileRows = 12;      // 12 AVX-512 accumulators, or two passes of 6 x 2 of AVX2
constexpr size_t kBlockColumns = 8;   // the same for squared differences in float64
constexpr size_t kBlockRows = 8;
constexpr size_t kRowPadding = 8;  // float64 rows are zero-padded to a multiple of this

// out[r][c] = sum_k a[k][r] b[k][c] for r < rows; a is (d, kTileRows), b is (d, kPanelColumns), 64-byte aligned.
void dot_tile(const float* a, const float* b, size_t d, size_t rows, float* out);

// Bounds of one row of dots: keys[c] = max(0, q_row + q[c] - 2 dots[c]), times 2 s_row s[c] / (s_row + s[c]) if
// `weighted`. Returns whether any keys[c] <= max(limit, limits[c]).
bool key_row(const float* dots, const float* q, const float* size, float q_row, float size_row, bool weighted,
             float limit, const float* limits, float* keys);

// sum_k (x[k] - y[k])^2; d is a multiple of kRowPadding. Bitwise symmetric in x and y.
double squared_distance(const double* x, const double* y, size_t d);

// out[r][c] = |x_r - y_c|^2 for kBlockRows rows given by pointers; y is (d, kBlockColumns), 64-byte aligned.
void squared_distance_tile(const double* const* x, const double* y, size_t d, double* out);

}  // namespace hiexp::clustering
