// See matrix_kernels.h.
#include "clustering/matrix_kernels.h"

#include <algorithm>

#include "clustering/levels.h"

namespace hiexp::clustering {

namespace {

typedef double Double2 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

struct Product {
  template <typename Vector>
  static HIEXP_INLINE void add(Vector& sum, const Vector& y, double x) {
    sum += x * y;
  }
};

struct Manhattan {
  template <typename Vector>
  static HIEXP_INLINE void add(Vector& sum, const Vector& y, double x) {
    const Vector difference = y - x;
    sum += difference < 0.0 ? -difference : difference;
  }
};

// kRows is fixed so that the sums stay in registers.
template <typename Term, typename Vector, size_t kRows>
HIEXP_INLINE void tile_rows(const double* const* x, const double* y, size_t d, double* out) {
  constexpr size_t kParts = kBlockColumns * sizeof(double) / sizeof(Vector);
  for (size_t first = 0; first < kBlockRows; first += kRows) {
    Vector sum[kRows][kParts] = {};
    for (size_t k = 0; k < d; ++k) {
      const Vector* panel = reinterpret_cast<const Vector*>(y + k * kBlockColumns);
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (size_t part = 0; part < kParts; ++part) Term::add(sum[r][part], panel[part], x[first + r][k]);
      }
    }
    std::copy_n(reinterpret_cast<const double*>(sum), kRows * kBlockColumns, out + first * kBlockColumns);
  }
}

#if HIEXP_LEVELS
template <typename Term>
__attribute__((target("arch=x86-64-v4"))) void tile_v4(const double* const* x, const double* y, size_t d, double* out) {
  tile_rows<Term, Double8, 8>(x, y, d, out);
}
template <typename Term>
__attribute__((target("arch=x86-64-v3"))) void tile_v3(const double* const* x, const double* y, size_t d, double* out) {
  tile_rows<Term, Double4, 4>(x, y, d, out);
}
#endif

template <typename Term>
void tile(const double* const* x, const double* y, size_t d, double* out) {
#if HIEXP_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return tile_v4<Term>(x, y, d, out);
  if (__builtin_cpu_supports("x86-64-v3")) return tile_v3<Term>(x, y, d, out);
#endif
  tile_rows<Term, Double2, 2>(x, y, d, out);
}

constexpr size_t kChunk = 32;

template <typename T, typename Limit>
HIEXP_INLINE size_t search(const T* values, size_t begin, size_t end, Limit limit) {
  size_t j = begin;
  for (; j + kChunk <= end; j += kChunk) {
    int hits = 0;
    for (size_t k = 0; k < kChunk; ++k) hits |= values[j + k] <= limit(j + k);
    if (hits != 0) break;
  }
  for (; j < end; ++j) {
    if (values[j] <= limit(j)) return j;
  }
  return end;
}

}  // namespace

void product_tile(const double* const* x, const double* y, size_t d, double* out) { tile<Product>(x, y, d, out); }
void manhattan_tile(const double* const* x, const double* y, size_t d, double* out) { tile<Manhattan>(x, y, d, out); }

HIEXP_CLONES
void square_row(const float* dots, const float* q, float q_row, float* out) {
  for (size_t c = 0; c < kPanelColumns; ++c) {
    const float square = q_row + q[c] - 2.0f * dots[c];
    out[c] = square > 0.0f ? square : 0.0f;
  }
}

template <>
HIEXP_CLONES size_t first_at_most(const double* values, size_t begin, size_t end, double limit) {
  return search(values, begin, end, [limit](size_t) { return limit; });
}
template <>
HIEXP_CLONES size_t first_at_most(const float* values, size_t begin, size_t end, float limit) {
  return search(values, begin, end, [limit](size_t) { return limit; });
}
template <>
HIEXP_CLONES size_t first_at_most(const double* values, size_t begin, size_t end, const double* limits) {
  return search(values, begin, end, [limits](size_t j) { return limits[j]; });
}
template <>
HIEXP_CLONES size_t first_at_most(const float* values, size_t begin, size_t end, const float* limits) {
  return search(values, begin, end, [limits](size_t j) { return limits[j]; });
}

}  // namespace hiexp::clustering
