// See row_epilogue.h. GCC vector types name the registers; the loader picks the widest instructions the machine has.
#include "scoring/row_epilogue.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "clustering/thread_pool.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define HIEXP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HIEXP_CLONES
#endif
#define HIEXP_INLINE __attribute__((always_inline)) inline

namespace hiexp::scoring {

namespace {

constexpr size_t kVectorBytes = 64;
// exp is exactly 0 here and below, and 0 * -1e4 is 0 where 0 * -inf would be NaN (a bias may be -inf).
constexpr float kFloor = -1e4F;
// A tile row costs a few microseconds: enough rows a task to hide the pool's own work.
constexpr size_t kRowsPerTask = 16;

template <typename Real>
struct Lanes;

// kRounder: adding 1.5 * 2^(mantissa bits) rounds to the nearest integer and leaves it in the low bits.
// kLowest: the exponential of anything below is taken as 0 (it would be a denormal number).
// kLn2High has trailing zero bits, so that n * kLn2High is exact. kTerms: Taylor terms of e^r, |r| <= ln(2) / 2, that
// leave a relative error below half a unit in the last place.
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr float kRounder = 12582912.0F, kLowest = -87.0F;
  static constexpr float kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 8;
};

template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr double kRounder = 6755399441055744.0, kLowest = -708.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 14;
};

template <typename Real>
using Vector = typename Lanes<Real>::Vector;

template <typename Real>
constexpr size_t kWidth = kVectorBytes / sizeof(Real);

constexpr double kLog2E = 1.4426950408889634;

template <typename Real>
HIEXP_INLINE void load(const Real* from, Vector<Real>& to) {
  std::memcpy(&to, from, kVectorBytes);
}

// The last columns of a row, filled up with `fill`.
template <typename Real>
HIEXP_INLINE void load_tail(const Real* from, size_t n, Real fill, Vector<Real>& to) {
  Real lanes[kWidth<Real>];
  std::fill_n(lanes, kWidth<Real>, fill);
  std::copy_n(from, n, lanes);
  load(lanes, to);
}

// x becomes e^x for x <= 0 or a little above; 0 far below, NaN for NaN. Vectors go by reference: by value they would
// change the calling convention between the clones.
template <typename Real>
HIEXP_INLINE void exponential(Vector<Real>& x) {
  using L = Lanes<Real>;
  const Vector<Real> shifted = x * static_cast<Real>(kLog2E) + L::kRounder;
  const Vector<Real> n = shifted - L::kRounder;
  const Vector<Real> r = (x - n * L::kLn2High) - n * L::kLn2Low;
  Vector<Real> sum = Vector<Real>{} + Real(1);
#pragma GCC unroll 16
  for (int k = L::kTerms - 1; k >= 1; --k) sum = sum * r * (Real(1) / Real(k)) + Real(1);
  typename L::Bits bits;
  std::memcpy(&bits, &shifted, kVectorBytes);
  bits = (bits << L::kMantissa) + (static_cast<decltype(bits[0] + 0)>(L::kBias) << L::kMantissa);
  Vector<Real> scale;
  std::memcpy(&scale, &bits, kVectorBytes);
  x = x < L::kLowest ? Vector<Real>{} : sum * scale;
}

template <typename Real>
HIEXP_INLINE Real sum_lanes(const Vector<Real>& x) {
  Real total = 0;
  for (size_t i = 0; i < kWidth<Real>; ++i) total += x[i];
  return total;
}

template <typename Real>
HIEXP_INLINE Real row_maximum(const Real* z, size_t n, Real start) {
  Vector<Real> first = Vector<Real>{} + start, second = first, x, y;
  size_t i = 0;
  for (; i + 2 * kWidth<Real> <= n; i += 2 * kWidth<Real>) {
    load(z + i, x);
    load(z + i + kWidth<Real>, y);
    first = x > first ? x : first;
    second = y > second ? y : second;
  }
  for (; i < n; i += kWidth<Real>) {
    load_tail(z + i, std::min(n - i, kWidth<Real>), start, x);
    first = x > first ? x : first;
  }
  first = second > first ? second : first;
  for (size_t lane = 0; lane < kWidth<Real>; ++lane) start = std::max(start, Real(first[lane]));
  return start;
}

template <typename Real, bool kEntropy>
HIEXP_INLINE void add_exponentials(Vector<Real>& x, Real peak, Vector<Real>& s, Vector<Real>& a) {
  x -= peak;
  if (kEntropy) x = x < Real(kFloor) ? Vector<Real>{} + Real(kFloor) : x;
  const Vector<Real> shifted = x;
  exponential<Real>(x);
  s += x;
  if (kEntropy) a += x * shifted;
}

template <typename Real, bool kEntropy>
HIEXP_INLINE void forward_row(const Real* z, size_t n, Real& m, Real& s, Real& a) {
  const Real peak = row_maximum(z, n, m);
  Vector<Real> sums[2] = {}, weighted[2] = {}, x;
  size_t i = 0;
  for (; i + 2 * kWidth<Real> <= n; i += 2 * kWidth<Real>) {
#pragma GCC unroll 2
    for (size_t part = 0; part < 2; ++part) {
      load(z + i + part * kWidth<Real>, x);
      add_exponentials<Real, kEntropy>(x, peak, sums[part], weighted[part]);
    }
  }
  for (; i < n; i += kWidth<Real>) {
    load_tail(z + i, std::min(n - i, kWidth<Real>), -std::numeric_limits<Real>::infinity(), x);
    add_exponentials<Real, kEntropy>(x, peak, sums[0], weighted[0]);
  }
  // The first tile's m is the lowest number: -inf would turn s = 0 into NaN.
  const Real shift = std::max(m - peak, Real(kFloor)), decay = std::exp(shift);
  sums[0] += sums[1];
  weighted[0] += weighted[1];
  if (kEntropy) a = decay * (a + shift * s) + sum_lanes<Real>(weighted[0]);
  s = decay * s + sum_lanes<Real>(sums[0]);
  m = peak;
}

template <typename Real>
HIEXP_INLINE const Real* finished_row(const Tile<Real>& tile, int64_t row, Real* scratch) {
  const Real* logits = tile.logits + row * tile.stride;
  if (!tile.bias && !tile.inverse_temperature) return logits;
  const Real scale = tile.inverse_temperature ? tile.inverse_temperature[row] : Real(1);
  for (int64_t i = 0; i < tile.columns; ++i) scratch[i] = (logits[i] + (tile.bias ? tile.bias[i] : Real(0))) * scale;
  return scratch;
}

template <typename Real>
HIEXP_INLINE void forward_rows(const Tile<Real>& tile, const State<Real>& state, bool entropy, size_t begin, size_t end,
                               Real* scratch) {
  for (size_t row = begin; row < end; ++row) {
    const Real* z = finished_row(tile, static_cast<int64_t>(row), scratch);
    Real &m = state.m[row], &s = state.s[row];
    if (entropy) {
      forward_row<Real, true>(z, tile.columns, m, s, state.a[row]);
    } else {
      forward_row<Real, false>(z, tile.columns, m, s, state.a[row]);
    }
    const int64_t target = tile.target[row];
    if (target >= 0 && target < tile.columns) state.z_y[row] = z[target];
  }
}

template <typename Real, bool kEntropy>
HIEXP_INLINE void gradient(Vector<Real>& x, Real lse, Real constant, Real entropy, Real scale) {
  x -= lse;
  if (kEntropy) {
    const Vector<Real> logprob = x < Real(kFloor) ? Vector<Real>{} + Real(kFloor) : x;
    exponential<Real>(x);
    x *= (constant - entropy * logprob) * scale;
  } else {
    exponential<Real>(x);
    x *= constant * scale;
  }
}

template <typename Real, bool kEntropy>
HIEXP_INLINE void backward_rows(const Tile<Real>& tile, const Upstream<Real>& upstream, Real* out, size_t begin,
                                size_t end, Real* scratch) {
  for (size_t row = begin; row < end; ++row) {
    const Real* z = finished_row(tile, static_cast<int64_t>(row), scratch);
    Real* gradients = out + row * tile.stride;
    const Real scale = tile.inverse_temperature ? tile.inverse_temperature[row] : Real(1);
    const Real lse = upstream.lse[row], constant = upstream.constant[row];
    const Real entropy = kEntropy ? upstream.entropy[row] : Real(0);
    const size_t n = tile.columns;
    Vector<Real> x;
    size_t i = 0;
    for (; i + kWidth<Real> <= n; i += kWidth<Real>) {
      load(z + i, x);
      gradient<Real, kEntropy>(x, lse, constant, entropy, scale);
      std::memcpy(gradients + i, &x, kVectorBytes);
    }
    if (i < n) {
      load_tail(z + i, n - i, lse, x);
      gradient<Real, kEntropy>(x, lse, constant, entropy, scale);
      std::memcpy(gradients + i, &x, (n - i) * sizeof(Real));
    }
    const int64_t target = tile.target[row];
    if (target >= 0 && target < tile.columns) gradients[target] += upstream.target[row] * scale;
  }
}

HIEXP_CLONES void forward_range(const Tile<float>& tile, const State<float>& state, bool entropy, size_t begin,
                                size_t end, float* scratch) {
  forward_rows(tile, state, entropy, begin, end, scratch);
}

HIEXP_CLONES void forward_range(const Tile<double>& tile, const State<double>& state, bool entropy, size_t begin,
                                size_t end, double* scratch) {
  forward_rows(tile, state, entropy, begin, end, scratch);
}

HIEXP_CLONES void backward_range(const Tile<float>& tile, const Upstream<float>& upstream, float* out, size_t begin,
                                 size_t end, float* scratch) {
  if (upstream.entropy) return backward_rows<float, true>(tile, upstream, out, begin, end, scratch);
  backward_rows<float, false>(tile, upstream, out, begin, end, scratch);
}

HIEXP_CLONES void backward_range(const Tile<double>& tile, const Upstream<double>& upstream, double* out, size_t begin,
                                 size_t end, double* scratch) {
  if (upstream.entropy) return backward_rows<double, true>(tile, upstream, out, begin, end, scratch);
  backward_rows<double, false>(tile, upstream, out, begin, end, scratch);
}

// body(begin, end, scratch of one row) over all rows of the tile.
template <typename Real, typename Body>
void for_rows(const Tile<Real>& tile, int n_threads, const Body& body) {
  const size_t rows = tile.rows;
  const int useful = static_cast<int>(std::min<size_t>(n_threads, (rows + kRowsPerTask - 1) / kRowsPerTask));
  clustering::ThreadPool pool(std::max(useful, 1));
  pool.run_ranges(rows, kRowsPerTask, [&](size_t begin, size_t end) {
    std::vector<Real> scratch(tile.bias || tile.inverse_temperature ? tile.columns : 0);
    body(begin, end, scratch.data());
  });
}

}  // namespace

template <typename Real>
void forward_tile(const Tile<Real>& tile, const State<Real>& state, bool entropy, int n_threads) {
  for_rows(tile, n_threads,
           [&](size_t begin, size_t end, Real* scratch) { forward_range(tile, state, entropy, begin, end, scratch); });
}

template <typename Real>
void backward_tile(const Tile<Real>& tile, const Upstream<Real>& upstream, Real* out, int n_threads) {
  for_rows(tile, n_threads,
           [&](size_t begin, size_t end, Real* scratch) { backward_range(tile, upstream, out, begin, end, scratch); });
}

template void forward_tile<float>(const Tile<float>&, const State<float>&, bool, int);
template void forward_tile<double>(const Tile<double>&, const State<double>&, bool, int);
template void backward_tile<float>(const Tile<float>&, const Upstream<float>&, float*, int);
template void backward_tile<double>(const Tile<double>&, const Upstream<double>&, double*, int);

}  // namespace hiexp::scoring
