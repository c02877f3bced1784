// Inner loops of the exact search. Compiled for several x86-64 levels in one binary; the loader picks one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hiexp::retrieval {

constexpr size_t kBlock = 64;  // points of a block: one cache line of codes a column

// sum[p] += sum_i weights[i] codes[columns[i]][p] for the kBlock points of a block; codes is (columns, kBlock).
void add_columns(const int8_t* codes, const int32_t* columns, const float* weights, size_t n, float* sum);

// bounds[p] = sum[p] + scale tail[p] + slack; returns the largest. NaN, from infinities, counts as infinity.
float upper_bounds(const float* sum, const float* tail, float scale, float slack, float* bounds);

// sum_i x[i] q[i] in float64, products exact, summed in the order of numpy's pairwise sum: the bits of
// (x.astype(float64) * q).sum().
double exact_dot(const float* x, const double* q, size_t d);

}  // namespace hiexp::retrieval
