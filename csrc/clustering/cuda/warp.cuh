// What the lanes of a warp do together: sums, squared distances by eight lanes, sorted lists with one entry a lane.
#pragma once

#include "clustering/cuda/scan_logic.h"

namespace hiexp::clustering::device {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / kWarp;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

struct Warp {
  __device__ int rank() const { return lane_index(); }
  __device__ int size() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }
  __device__ double sum(double value) const {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }
  __device__ double max(double value) const {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      value = fmax(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
  }
};

// Adds the sums of eight lanes in the order of squared_distance() in kernels.cpp, so that costs agree bit by bit: lane
// l + lane l + 4 first, then neighbours, then pairs of them. Every lane gets the total.
__device__ inline double octet_sum(unsigned mask, double value) {
  value += __shfl_xor_sync(mask, value, 4);
  value += __shfl_xor_sync(mask, value, 1);
  return value + __shfl_xor_sync(mask, value, 2);
}

struct Octet {
  __device__ bool lead() const { return threadIdx.x % 8 == 0; }
  __device__ double squared_distance(const double* x, const double* y, int d) const {
    double sum = 0.0;
    for (int k = static_cast<int>(threadIdx.x) % 8; k < d; k += 8) {
      const double difference = x[k] - y[k];
      sum = fma(difference, difference, sum);
    }
    return octet_sum(0xffu << (lane_index() / 8 * 8), sum);
  }
};

__device__ inline Approximate shuffle(const Approximate& from, int lane) {
  return {__shfl_sync(kAllLanes, from.cost, lane), __shfl_sync(kAllLanes, from.slot, lane)};
}
__device__ inline Exact shuffle(const Exact& from, int lane) {
  return {__shfl_sync(kAllLanes, from.cost, lane), __shfl_sync(kAllLanes, from.slot, lane)};
}

// The kKeep first candidates of a row in their order, one in each of the first lanes. All lanes take part in all calls.
template <typename Candidate>
struct WarpList {
  Candidate mine;

  __device__ void clear() { mine = no_candidate<Candidate>(); }

  // Takes the candidates of all lanes where `usable`; returns whether any was kept.
  __device__ bool offer(const Candidate& candidate, bool usable, int32_t row) {
    const Candidate last = shuffle(mine, kKeep - 1);
    const unsigned hits = __ballot_sync(kAllLanes, usable && comes_before(candidate, last, row));
    for (unsigned left = hits; left != 0; left &= left - 1) insert(shuffle(candidate, __ffs(left) - 1), row);
    return hits != 0;
  }

  __device__ void insert(const Candidate& candidate, int32_t row) {
    const int lane = lane_index();
    const bool before = lane < kKeep && comes_before(mine, candidate, row);
    const int place = __popc(__ballot_sync(kAllLanes, before));
    const Candidate left = shuffle(mine, lane > 0 ? lane - 1 : 0);
    if (lane > place) mine = left;
    if (lane == place) mine = candidate;
  }

  __device__ void store_list(const Clusters& c, int32_t row) const {
    const int lane = lane_index();
    if (lane < kKeep) store(c, row, lane, mine);
    const unsigned filled = __ballot_sync(kAllLanes, lane < kList && mine.slot >= 0);
    if (lane == 0) c.counts[row] = __popc(filled);
  }
};

// Rows whose columns were split among blocks: joins their partial lists (items, rows_per_block, kKeep). A warp a row.
template <typename Candidate>
__global__ void __launch_bounds__(kThreads)
    join_parts_kernel(Clusters c, const int32_t* rows, Span span, int64_t rows_per_block, int64_t columns_per_tile,
                      const Candidate* parts) {
  const Splits split = Splits::of(span.end(), rows_per_block, c.listed, columns_per_tile, c.grid);
  if (split.splits == 1) return;
  for (int64_t w = blockIdx.x * kWarps + threadIdx.x / kWarp; w < split.rows; w += int64_t{gridDim.x} * kWarps) {
    const int32_t row = rows[w];
    WarpList<Candidate> list;
    list.clear();
    for (int64_t s = 0; s < split.splits; ++s) {
      const int64_t item = w / rows_per_block * split.splits + s;
      const int lane = lane_index();
      Candidate candidate = no_candidate<Candidate>();
      if (lane < kKeep) candidate = parts[(item * rows_per_block + w % rows_per_block) * kKeep + lane];
      list.offer(candidate, candidate.slot >= 0, row);
    }
    list.store_list(c, row);
  }
}

}  // namespace hiexp::clustering::device
