// Inner loops of the exact search. Compiled for several x86-64 levels in one binary; the loader picks one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hiexp::retrieval {

constexpr size_t kBlock = 128;  // points of a block: one cache line of cells a column
constexpr size_t kCells = 16;   // intervals that the values of a column are sorted into: half a byte
constexpr size_t kGroup = 16;   // points of a dense vector's line
constexpr size_t kChunk = 512;  // columns whose table entries add up without leaving 16 bits

// Half-byte cells. Sparse vectors: one column of a block, all points. Dense ones: 8 columns of kGroup points.
struct alignas(64) Line {
  uint8_t bytes[kBlock / 2];
};

// Where a point's cell lies, so that add_cells widens bytes to 16 bits without moving them.
constexpr size_t line_byte(size_t lane) { return 2 * (lane % 32) + lane / 32 % 2; }
constexpr int line_shift(size_t lane) { return lane < kBlock / 2 ? 0 : 4; }

// cells[c] = number of edges[k][c] <= values[c]; edges is (n_edges, d).
void find_cells(const float* values, const float* edges, size_t n_edges, size_t d, uint8_t* cells);

// sum[p] = sum_i tables[i][cell of point p in column columns[i]] of a block whose lines are `lines`. n is even, at most
// kChunk, and no entry of table 2i plus one of table 2i + 1 exceeds 255. The same columns of the next block, `stride`
// lines on, are fetched early: searches read one block after the other, and the processor does not guess which columns.
void add_cells(const Line* lines, size_t stride, const int32_t* columns, const uint8_t* tables, size_t n,
               uint16_t* sum);

// sum[p] += base + unit sum_c (128 high[c] + low[c]) cell[c][p] for the kGroup points of `n` dense lines; the cells of
// point p are those of bytes 4p to 4p + 3, lower halves first. high and low are (8 n,), low within -64 to 64.
void add_products(const Line* lines, const int8_t* high, const int8_t* low, size_t n, float unit, float base,
                  float* sum);

// sum[p] += base + unit cells[p].
void add_scaled(const uint16_t* cells, float unit, float base, float* sum);

// bounds[p] = sum[p] + scale tail[p] + slack; returns the largest.
float upper_bounds(const float* sum, const float* tail, float scale, float slack, float* bounds);

// out = query rotation; rotation is (d, d).
void turn(const float* query, const float* rotation, size_t d, float* out);

// sum_i x[i] q[i] in float64, products exact, summed in the order of numpy's pairwise sum: the bits of
// (x.astype(float64) * q).sum().
double exact_dot(const float* x, const double* q, size_t d);

}  // namespace hiexp::retrieval
