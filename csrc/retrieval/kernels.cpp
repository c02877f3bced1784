// See kernels.h.
#include "retrieval/kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "clustering/levels.h"

#if HIEXP_LEVELS
#include <immintrin.h>
#endif

namespace hiexp::retrieval {

namespace {

typedef float Float16 __attribute__((vector_size(64)));

constexpr size_t kLanes = 16, kParts = kBlock / kLanes;
constexpr size_t kAhead = 8;  // columns: far enough to hide a miss to the last cache

}  // namespace

namespace {

using AddColumns = void (*)(const int8_t*, const int32_t*, const float*, size_t, float*);

void add_columns_plain(const int8_t* codes, const int32_t* columns, const float* weights, size_t n, float* sum) {
  for (size_t i = 0; i < n; ++i) {
    const int8_t* column = codes + static_cast<size_t>(columns[i]) * kBlock;
    const float weight = weights[i];
    for (size_t p = 0; p < kBlock; ++p) sum[p] += weight * static_cast<float>(column[p]);
  }
}

#if HIEXP_LEVELS

// By hand: GCC widens bytes one at a time where vector types are converted or the sums shall stay in registers.
__attribute__((target("avx512f"))) void add_columns_avx512(const int8_t* codes, const int32_t* columns,
                                                           const float* weights, size_t n, float* sum) {
  __m512 total[4];
  for (size_t part = 0; part < 4; ++part) total[part] = _mm512_loadu_ps(sum + part * 16);
  for (size_t i = 0; i < n; ++i) {
    const int8_t* column = codes + static_cast<size_t>(columns[i]) * kBlock;
    if (i + kAhead < n) __builtin_prefetch(codes + static_cast<size_t>(columns[i + kAhead]) * kBlock);
    const __m512 weight = _mm512_set1_ps(weights[i]);
#pragma GCC unroll 4
    for (size_t part = 0; part < 4; ++part) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(column + part * 16));
      total[part] = _mm512_fmadd_ps(weight, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), total[part]);
    }
  }
  for (size_t part = 0; part < 4; ++part) _mm512_storeu_ps(sum + part * 16, total[part]);
}

__attribute__((target("avx2,fma"))) void add_columns_avx2(const int8_t* codes, const int32_t* columns,
                                                          const float* weights, size_t n, float* sum) {
  __m256 total[8];
  for (size_t part = 0; part < 8; ++part) total[part] = _mm256_loadu_ps(sum + part * 8);
  for (size_t i = 0; i < n; ++i) {
    const int8_t* column = codes + static_cast<size_t>(columns[i]) * kBlock;
    if (i + kAhead < n) __builtin_prefetch(codes + static_cast<size_t>(columns[i + kAhead]) * kBlock);
    const __m256 weight = _mm256_set1_ps(weights[i]);
#pragma GCC unroll 8
    for (size_t part = 0; part < 8; ++part) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(column + part * 8));
      total[part] = _mm256_fmadd_ps(weight, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), total[part]);
    }
  }
  for (size_t part = 0; part < 8; ++part) _mm256_storeu_ps(sum + part * 8, total[part]);
}

#endif

AddColumns choose_add_columns() {
#if HIEXP_LEVELS
  if (__builtin_cpu_supports("avx512f")) return add_columns_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return add_columns_avx2;
#endif
  return add_columns_plain;
}

}  // namespace

void add_columns(const int8_t* codes, const int32_t* columns, const float* weights, size_t n, float* sum) {
  static const AddColumns chosen = choose_add_columns();
  chosen(codes, columns, weights, n, sum);
}

HIEXP_CLONES float upper_bounds(const float* sum, const float* tail, float scale, float slack, float* bounds) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Float16 largest = Float16{} - kInfinity;
#pragma GCC unroll 4
  for (size_t part = 0; part < kParts; ++part) {
    Float16 s, t;
    std::memcpy(&s, sum + part * kLanes, sizeof s);
    std::memcpy(&t, tail + part * kLanes, sizeof t);
    Float16 bound = s + scale * t + slack;
    bound = bound == bound ? bound : Float16{} + kInfinity;
    largest = bound > largest ? bound : largest;
    std::memcpy(bounds + part * kLanes, &bound, sizeof bound);
  }
  float result = largest[0];
  for (size_t lane = 1; lane < kLanes; ++lane) result = largest[lane] > result ? largest[lane] : result;
  return result;
}

namespace {

constexpr size_t kLeaf = 128, kUnroll = 8;  // of numpy's pairwise sum

HIEXP_CLONES double leaf_dot(const float* x, const double* q, size_t d) {
  size_t i = 0;
  double result = 0.0;
  if (d >= kUnroll) {
    double sums[kUnroll] = {};
    for (; i + kUnroll <= d; i += kUnroll) {
      for (size_t k = 0; k < kUnroll; ++k) sums[k] += static_cast<double>(x[i + k]) * q[i + k];
    }
    result = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
  for (; i < d; ++i) result += static_cast<double>(x[i]) * q[i];
  return result;
}

}  // namespace

double exact_dot(const float* x, const double* q, size_t d) {
  if (d <= kLeaf) return leaf_dot(x, q, d);
  const size_t half = d / 2 - (d / 2) % kUnroll;
  return exact_dot(x, q, half) + exact_dot(x + half, q + half, d - half);
}

}  // namespace hiexp::retrieval
