// All costs of a few rows in float64, where low precision could not rank their candidates. A block takes kCostRows rows
// and a range of columns; eight lanes share a column, so that its coordinates are loaded once for all rows.
#pragma once

#include "clustering/cuda/warp.cuh"

namespace hiexp::clustering::device {

constexpr int kCostColumns = kThreads / 8;  // columns a block looks at together

// Costs of this octet's column to all rows; all lanes of the octet get them.
__device__ inline void column_costs(const Clusters& c, const int32_t (&rows)[kCostRows], int32_t column,
                                    double (&costs)[kCostRows]) {
  double sums[kCostRows] = {};
  const double* y = c.centroid(column);
  for (int k = static_cast<int>(threadIdx.x) % 8; k < c.d; k += 8) {
    const double coordinate = y[k];
#pragma unroll
    for (int r = 0; r < kCostRows; ++r) {
      const double difference = c.centroid(rows[r])[k] - coordinate;
      sums[r] = fma(difference, difference, sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kCostRows; ++r) costs[r] = c.cost(rows[r], column, octet_sum(kAllLanes, sums[r]));
}

// Lists of all warps for the block's rows -> one list a row, in the first kCostRows warps.
__device__ inline WarpList<Exact> join_warps(const WarpList<Exact> (&lists)[kCostRows],
                                             const int32_t (&rows)[kCostRows],
                                             Exact (&memory)[kCostRows][kWarps][kKeep]) {
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp;
  __syncthreads();  // the previous item is read
#pragma unroll
  for (int r = 0; r < kCostRows; ++r) {
    if (lane < kKeep) memory[r][warp][lane] = lists[r].mine;
  }
  __syncthreads();
  WarpList<Exact> joined;
  joined.clear();
#pragma unroll
  for (int r = 0; r < kCostRows; ++r) {
    if (r != warp) continue;
    for (int other = 0; other < kWarps; ++other) {
      const Exact candidate = memory[r][other][lane < kKeep ? lane : 0];
      joined.offer(candidate, lane < kKeep && candidate.slot >= 0, rows[r]);
    }
  }
  return joined;
}

__global__ void __launch_bounds__(kThreads, 2) scan_costs_kernel(Clusters c, const int32_t* scan, Span span) {
  __shared__ Exact memory[kCostRows][kWarps][kKeep];
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t count = span.end(), tiles = (c.listed + kCostColumns - 1) / kCostColumns;
  const Splits split = Splits::of(count, kCostRows, c.listed, kCostColumns, c.grid);
  for (int64_t item = blockIdx.x; item < split.items(); item += gridDim.x) {
    const int64_t first = item / split.splits * kCostRows, part = item % split.splits;
    int32_t rows[kCostRows];
    WarpList<Exact> lists[kCostRows];
#pragma unroll
    for (int r = 0; r < kCostRows; ++r) {
      rows[r] = scan[first + r < count ? first + r : first];  // a row too many is computed and dropped
      lists[r].clear();
    }
    for (int64_t t = split.begin(part, tiles); t < split.begin(part + 1, tiles); ++t) {
      const int64_t p = t * kCostColumns + static_cast<int>(threadIdx.x) / 8;
      const int32_t column = c.columns[p < c.listed ? p : c.listed - 1];
      double costs[kCostRows];
      column_costs(c, rows, column, costs);
      const bool offers = p < c.listed && threadIdx.x % 8 == 0 && c.states[column] != State::empty;
#pragma unroll
      for (int r = 0; r < kCostRows; ++r) lists[r].offer({costs[r], column}, offers && column != rows[r], rows[r]);
    }
    const WarpList<Exact> joined = join_warps(lists, rows, memory);
    if (warp >= kCostRows || first + warp >= count) continue;
    if (split.splits == 1) {
      joined.store_list(c, scan[first + warp]);
    } else if (lane < kKeep) {
      c.exact_parts[(item * kCostRows + warp) * kKeep + lane] = joined.mine;
    }
  }
}

}  // namespace hiexp::clustering::device
