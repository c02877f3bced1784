// See kernels.h.
#include "retrieval/kernels.h"

#include <cstring>
#include <limits>

#include "clustering/levels.h"

#if HIEXP_LEVELS
#include <immintrin.h>
#endif

namespace hiexp::retrieval {

namespace {

typedef float Float16 __attribute__((vector_size(64)));

constexpr size_t kLanes = 16, kHalf = kBlock / 2;

using AddCells = void (*)(const Line*, size_t, const int32_t*, const uint8_t*, size_t, uint16_t*);

void add_cells_plain(const Line* lines, size_t, const int32_t* columns, const uint8_t* tables, size_t n,
                     uint16_t* sum) {
  std::memset(sum, 0, kBlock * sizeof *sum);
  for (size_t i = 0; i < n; ++i) {
    const uint8_t *bytes = lines[columns[i]].bytes, *table = tables + i * kCells;
    for (size_t lane = 0; lane < kHalf; ++lane) {
      const uint8_t byte = bytes[line_byte(lane)];
      sum[lane] = static_cast<uint16_t>(sum[lane] + table[byte & 15]);
      sum[lane + kHalf] = static_cast<uint16_t>(sum[lane + kHalf] + table[byte >> 4]);
    }
  }
}

#if HIEXP_LEVELS

// A shuffle of bytes looks up 64 cells at once. Sums of two columns fit a byte; even and odd bytes are then widened.
__attribute__((target("avx512bw"))) void add_cells_avx512(const Line* lines, size_t stride, const int32_t* columns,
                                                          const uint8_t* tables, size_t n, uint16_t* sum) {
  const __m512i cell = _mm512_set1_epi8(15), even = _mm512_set1_epi16(255);
  __m512i total[4] = {};
  for (size_t i = 0; i < n; i += 2) {
    __m512i low = _mm512_setzero_si512(), high = low;
#pragma GCC unroll 2
    for (size_t k = i; k < i + 2; ++k) {
      const Line* line = lines + columns[k];
      __builtin_prefetch(line + stride);
      const __m512i bytes = _mm512_load_si512(line);
      const __m512i table =
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + k * kCells)));
      low = _mm512_add_epi8(low, _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, cell)));
      high = _mm512_add_epi8(high, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), cell)));
    }
    total[0] = _mm512_add_epi16(total[0], _mm512_and_si512(low, even));
    total[1] = _mm512_add_epi16(total[1], _mm512_srli_epi16(low, 8));
    total[2] = _mm512_add_epi16(total[2], _mm512_and_si512(high, even));
    total[3] = _mm512_add_epi16(total[3], _mm512_srli_epi16(high, 8));
  }
  for (size_t part = 0; part < 4; ++part) _mm512_storeu_si512(sum + part * 32, total[part]);
}

// The same, one half of every line after the other.
__attribute__((target("avx2"))) void add_cells_avx2(const Line* lines, size_t stride, const int32_t* columns,
                                                    const uint8_t* tables, size_t n, uint16_t* sum) {
  const __m256i cell = _mm256_set1_epi8(15), even = _mm256_set1_epi16(255);
  for (size_t half = 0; half < 2; ++half) {
    __m256i total[4] = {};
    for (size_t i = 0; i < n; i += 2) {
      __m256i low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 2
      for (size_t k = i; k < i + 2; ++k) {
        const Line* line = lines + columns[k];
        __builtin_prefetch(line + stride);
        const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(line) + half);
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + k * kCells)));
        low = _mm256_add_epi8(low, _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, cell)));
        high = _mm256_add_epi8(high, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), cell)));
      }
      total[0] = _mm256_add_epi16(total[0], _mm256_and_si256(low, even));
      total[1] = _mm256_add_epi16(total[1], _mm256_srli_epi16(low, 8));
      total[2] = _mm256_add_epi16(total[2], _mm256_and_si256(high, even));
      total[3] = _mm256_add_epi16(total[3], _mm256_srli_epi16(high, 8));
    }
    for (size_t part = 0; part < 4; ++part) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum + part * 32 + half * 16), total[part]);
    }
  }
}

#endif

using AddProducts = void (*)(const Line*, const int8_t*, const int8_t*, size_t, float, float, float*);

void add_integers(const int32_t* high, const int32_t* low, float unit, float base, float* sum) {
  for (size_t p = 0; p < kGroup; ++p) {
    sum[p] += base + unit * (128.0F * static_cast<float>(high[p]) + static_cast<float>(low[p]));
  }
}

void add_products_plain(const Line* lines, const int8_t* high, const int8_t* low, size_t n, float unit, float base,
                        float* sum) {
  alignas(64) int32_t sum_high[kGroup] = {}, sum_low[kGroup] = {};
  for (size_t i = 0; i < n; ++i) {
    for (size_t p = 0; p < kGroup; ++p) {
      for (size_t k = 0; k < 8; ++k) {
        const int32_t cell = lines[i].bytes[4 * p + k % 4] >> (k < 4 ? 0 : 4) & 15;
        sum_high[p] += cell * high[8 * i + k];
        sum_low[p] += cell * low[8 * i + k];
      }
    }
  }
  add_integers(sum_high, sum_low, unit, base, sum);
}

#if HIEXP_LEVELS

int32_t four_bytes(const int8_t* bytes) {
  int32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

__attribute__((target("avx512bw,avx512vnni"))) void add_products_vnni(const Line* lines, const int8_t* high,
                                                                      const int8_t* low, size_t n, float unit,
                                                                      float base, float* sum) {
  const __m512i cell = _mm512_set1_epi8(15);
  __m512i total_high = _mm512_setzero_si512(), total_low = total_high;
  for (size_t i = 0; i < n; ++i) {
    const __m512i bytes = _mm512_load_si512(lines + i);
    const __m512i first = _mm512_and_si512(bytes, cell);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), cell);
    total_high = _mm512_dpbusd_epi32(total_high, first, _mm512_set1_epi32(four_bytes(high + 8 * i)));
    total_high = _mm512_dpbusd_epi32(total_high, second, _mm512_set1_epi32(four_bytes(high + 8 * i + 4)));
    total_low = _mm512_dpbusd_epi32(total_low, first, _mm512_set1_epi32(four_bytes(low + 8 * i)));
    total_low = _mm512_dpbusd_epi32(total_low, second, _mm512_set1_epi32(four_bytes(low + 8 * i + 4)));
  }
  const __m512 total =
      _mm512_fmadd_ps(_mm512_set1_ps(128.0F), _mm512_cvtepi32_ps(total_high), _mm512_cvtepi32_ps(total_low));
  const __m512 product = _mm512_fmadd_ps(_mm512_set1_ps(unit), total, _mm512_set1_ps(base));
  _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), product));
}

__attribute__((target("avx2"))) inline __m256i products_avx2(__m256i cells, const int8_t* weights) {
  const __m256i pairs = _mm256_maddubs_epi16(cells, _mm256_set1_epi32(four_bytes(weights)));  // at most 2 * 15 * 127
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

__attribute__((target("avx2"))) void add_products_avx2(const Line* lines, const int8_t* high, const int8_t* low,
                                                       size_t n, float unit, float base, float* sum) {
  alignas(64) int32_t sum_high[kGroup] = {}, sum_low[kGroup] = {};
  const __m256i cell = _mm256_set1_epi8(15);
  for (size_t half = 0; half < 2; ++half) {
    __m256i total_high = _mm256_setzero_si256(), total_low = total_high;
    for (size_t i = 0; i < n; ++i) {
      const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(lines + i) + half);
      const __m256i first = _mm256_and_si256(bytes, cell);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), cell);
      total_high = _mm256_add_epi32(total_high, products_avx2(first, high + 8 * i));
      total_high = _mm256_add_epi32(total_high, products_avx2(second, high + 8 * i + 4));
      total_low = _mm256_add_epi32(total_low, products_avx2(first, low + 8 * i));
      total_low = _mm256_add_epi32(total_low, products_avx2(second, low + 8 * i + 4));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum_high) + half, total_high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum_low) + half, total_low);
  }
  add_integers(sum_high, sum_low, unit, base, sum);
}

#endif

AddProducts choose_add_products() {
#if HIEXP_LEVELS
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return add_products_vnni;
  if (__builtin_cpu_supports("avx2")) return add_products_avx2;
#endif
  return add_products_plain;
}

AddCells choose_add_cells() {
#if HIEXP_LEVELS
  if (__builtin_cpu_supports("avx512bw")) return add_cells_avx512;
  if (__builtin_cpu_supports("avx2")) return add_cells_avx2;
#endif
  return add_cells_plain;
}

}  // namespace

void add_cells(const Line* lines, size_t stride, const int32_t* columns, const uint8_t* tables, size_t n,
               uint16_t* sum) {
  static const AddCells chosen = choose_add_cells();
  chosen(lines, stride, columns, tables, n, sum);
}

void add_products(const Line* lines, const int8_t* high, const int8_t* low, size_t n, float unit, float base,
                  float* sum) {
  static const AddProducts chosen = choose_add_products();
  chosen(lines, high, low, n, unit, base, sum);
}

HIEXP_CLONES void find_cells(const float* values, const float* edges, size_t n_edges, size_t d, uint8_t* cells) {
  for (size_t begin = 0; begin < d; begin += kLanes) {
    const size_t end = begin + kLanes < d ? begin + kLanes : d;
    int32_t counts[kLanes] = {};
    for (size_t k = 0; k < n_edges; ++k) {
      for (size_t c = begin; c < end; ++c) counts[c - begin] += edges[k * d + c] <= values[c];
    }
    for (size_t c = begin; c < end; ++c) cells[c] = static_cast<uint8_t>(counts[c - begin]);
  }
}

HIEXP_CLONES void add_scaled(const uint16_t* cells, float unit, float base, float* sum) {
  for (size_t p = 0; p < kBlock; ++p) sum[p] += base + unit * static_cast<float>(cells[p]);
}

HIEXP_CLONES float upper_bounds(const float* sum, const float* tail, float scale, float slack, float* bounds) {
  Float16 largest = Float16{} - std::numeric_limits<float>::infinity();
  for (size_t p = 0; p < kBlock; p += kLanes) {
    Float16 s, t;
    std::memcpy(&s, sum + p, sizeof s);
    std::memcpy(&t, tail + p, sizeof t);
    const Float16 bound = s + scale * t + slack;
    largest = bound > largest ? bound : largest;
    std::memcpy(bounds + p, &bound, sizeof bound);
  }
  float result = largest[0];
  for (size_t lane = 1; lane < kLanes; ++lane) result = largest[lane] > result ? largest[lane] : result;
  return result;
}

HIEXP_CLONES void turn(const float* query, const float* rotation, size_t d, float* out) {
  for (size_t c = 0; c < d; ++c) out[c] = 0.0F;
  for (size_t i = 0; i < d; ++i) {
    for (size_t c = 0; c < d; ++c) out[c] += query[i] * rotation[i * d + c];
  }
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
