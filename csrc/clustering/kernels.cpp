// See kernels.h. GCC vector types name the registers; each x86-64 level gets the widest it has and as many accumulators
// as hide the latency of a multiply-add (8 in flight) without spilling (16 registers of AVX2, 32 of AVX-512).
#include "clustering/kernels.h"

#include <algorithm>

#include "clustering/levels.h"

namespace hiexp::clustering {

namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
typedef double Double4Unaligned __attribute__((vector_size(32), aligned(8)));
typedef double Double4 __attribute__((vector_size(32)));

// kRows is fixed so that the sums stay in registers: kRows x 3 of them.
template <typename Vector, size_t kRows>
HIEXP_INLINE void dot_rows(const float* a, const float* b, size_t d, float* out) {
  constexpr size_t kParts = 3, kLanes = sizeof(Vector) / sizeof(float);
  for (size_t first = 0; first < kPanelColumns; first += kParts * kLanes) {
    Vector sum[kRows][kParts] = {};
    for (size_t k = 0; k < d; ++k) {
      const Vector* panel = reinterpret_cast<const Vector*>(b + k * kPanelColumns + first);
      const Vector y[kParts] = {panel[0], panel[1], panel[2]};
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        const float x = a[k * kTileRows + r];
#pragma GCC unroll 3
        for (size_t part = 0; part < kParts; ++part) sum[r][part] += x * y[part];
      }
    }
    for (size_t r = 0; r < kRows; ++r) {
      std::copy_n(reinterpret_cast<const float*>(sum[r]), kParts * kLanes, out + r * kPanelColumns + first);
    }
  }
}

// Few rows are common late in the clustering and must not cost a whole tile.
template <typename Vector, size_t kStep>
HIEXP_INLINE void dot_passes(const float* a, const float* b, size_t d, size_t rows, float* out) {
  if (rows == 1) return dot_rows<Vector, 1>(a, b, d, out);
  if (rows == 2) return dot_rows<Vector, 2>(a, b, d, out);
  if (rows <= 4) return dot_rows<Vector, 4>(a, b, d, out);
  for (size_t r = 0; r < rows; r += kStep) dot_rows<Vector, kStep>(a + r, b, d, out + r * kPanelColumns);
}

template <typename Vector, size_t kRows>
HIEXP_INLINE void difference_rows(const double* const* x, const double* y, size_t d, double* out) {
  constexpr size_t kParts = kBlockColumns * sizeof(double) / sizeof(Vector);
  for (size_t first = 0; first < kBlockRows; first += kRows) {
    Vector sum[kRows][kParts] = {};
    for (size_t k = 0; k < d; ++k) {
      const Vector* panel = reinterpret_cast<const Vector*>(y + k * kBlockColumns);
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (size_t part = 0; part < kParts; ++part) {
          const Vector difference = panel[part] - x[first + r][k];
          sum[r][part] += difference * difference;
        }
      }
    }
    std::copy_n(reinterpret_cast<const double*>(sum), kRows * kBlockColumns, out + first * kBlockColumns);
  }
}

#if HIEXP_LEVELS
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));

__attribute__((target("arch=x86-64-v4"))) void dots(const float* a, const float* b, size_t d, size_t rows, float* out) {
  dot_passes<Float16, 8>(a, b, d, rows, out);
}
__attribute__((target("arch=x86-64-v3"))) void dots(const float* a, const float* b, size_t d, size_t rows, float* out) {
  dot_passes<Float8, 4>(a, b, d, rows, out);
}
__attribute__((target("arch=x86-64-v4"))) void differences(const double* const* x, const double* y, size_t d,
                                                           double* out) {
  difference_rows<Double8, 8>(x, y, d, out);
}
__attribute__((target("arch=x86-64-v3"))) void differences(const double* const* x, const double* y, size_t d,
                                                           double* out) {
  difference_rows<Double4, 4>(x, y, d, out);
}
__attribute__((target("default")))
#endif
void dots(const float* a, const float* b, size_t d, size_t rows, float* out) {
  dot_passes<Float4, 4>(a, b, d, rows, out);
}
#if HIEXP_LEVELS
__attribute__((target("default")))
#endif
void differences(const double* const* x, const double* y, size_t d, double* out) {
  difference_rows<Double2, 2>(x, y, d, out);
}

}  // namespace

void dot_tile(const float* a, const float* b, size_t d, size_t rows, float* out) { dots(a, b, d, rows, out); }

void squared_distance_tile(const double* const* x, const double* y, size_t d, double* out) {
  differences(x, y, d, out);
}

HIEXP_CLONES
bool mark_tile(const TileSide& rows, size_t n_rows, const TileSide& columns, bool weighted, float* __restrict dots,
               uint8_t* __restrict hits) {
  // Without a division: both sides are multiplied by the sum of the sizes; the factor covers the rounding.
  constexpr float kSlack = 1.0f + 1e-5f;
  const float* __restrict column_q = columns.q;
  const float* __restrict column_size = columns.size;
  const float* __restrict column_limit = columns.limit;
  int32_t any = 0;
  for (size_t r = 0; r < n_rows; ++r) {
    float* __restrict row = dots + r * kPanelColumns;
    int32_t marks[kPanelColumns];
    const float q = rows.q[r], size = rows.size[r], limit = rows.limit[r];
    for (size_t c = 0; c < kPanelColumns; ++c) row[c] = q + column_q[c] - 2.0f * row[c];
    if (weighted) {
      for (size_t c = 0; c < kPanelColumns; ++c) {
        const float larger = column_limit[c] > limit ? column_limit[c] : limit;
        const float left = row[c] * (2.0f * size * column_size[c]);
        marks[c] = left <= larger * ((size + column_size[c]) * kSlack) ? 1 : 0;
      }
    } else {
      for (size_t c = 0; c < kPanelColumns; ++c) {
        const float larger = column_limit[c] > limit ? column_limit[c] : limit;
        marks[c] = row[c] <= larger ? 1 : 0;
      }
    }
    int32_t found = 0;
    for (size_t c = 0; c < kPanelColumns; ++c) found |= marks[c];
    for (size_t c = 0; c < kPanelColumns; ++c) hits[r * kPanelColumns + c] = static_cast<uint8_t>(marks[c]);
    any |= found;
  }
  return any != 0;
}

HIEXP_CLONES
double squared_distance(const double* x, const double* y, size_t d) {
  Double4 sum[2] = {};
  for (size_t k = 0; k < d; k += kRowPadding) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; ++half) {
      const Double4 difference = *reinterpret_cast<const Double4Unaligned*>(x + k + 4 * half) -
                                 *reinterpret_cast<const Double4Unaligned*>(y + k + 4 * half);
      sum[half] += difference * difference;
    }
  }
  const Double4 total = sum[0] + sum[1];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

}  // namespace hiexp::clustering
