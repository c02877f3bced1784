// Inner loops over coordinates. Compiled for several x86-64 levels in one binary; the loader picks one, so wheels stay
// portable. All sums run in a fixed order, so a value depends on its operands alone: never on threads or blocking.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hiexp::clustering {

// 8 x 48 sums are 24 AVX-512 accumulators; AVX2 makes 4 passes of 4 x 24 (12 accumulators), SSE and NEON 8 of 4 x 12.
constexpr size_t kPanelColumns = 48;  // columns of a packed float32 panel
constexpr size_t kTileRows = 8;
constexpr size_t kBlockColumns = 8;  // the same for squared differences in float64
constexpr size_t kBlockRows = 8;
constexpr size_t kRowPadding = 8;  // float64 rows are zero-padded to a multiple of this

// out[r][c] = sum_k a[k][r] b[k][c] for r < rows; a is (d, kTileRows), b is (d, kPanelColumns), 64-byte aligned.
void dot_tile(const float* a, const float* b, size_t d, size_t rows, float* out);

// What the bounds of a tile are made of, for its rows or its columns.
struct TileSide {
  const float* q;      // squared norms
  const float* size;   // members
  const float* limit;  // a pair is worth a look if its bound is at most the limit of either side
};

// Replaces the dots of a tile by t = q_row + q_column - 2 dot and marks in hits[r][c] (0 or 1) the pairs that may be
// worth a look: t (times 2 s_row s_column / (s_row + s_column) if `weighted`) <= a limit; a few more where weighted.
// Returns whether there is any.
bool mark_tile(const TileSide& rows, size_t n_rows, const TileSide& columns, bool weighted, float* dots, uint8_t* hits);

// sum_k (x[k] - y[k])^2; d is a multiple of kRowPadding. Bitwise symmetric in x and y.
double squared_distance(const double* x, const double* y, size_t d);

// out[r][c] = |x_r - y_c|^2 for kBlockRows rows given by pointers; y is (d, kBlockColumns), 64-byte aligned.
void squared_distance_tile(const double* const* x, const double* y, size_t d, double* out);

}  // namespace hiexp::clustering
