// The chain of tail_logic.h on one block: it is sequential, so more blocks would only wait for each other.
#pragma once

#include "clustering/cuda/tail_logic.h"
#include "clustering/cuda/warp.cuh"

namespace hiexp::clustering::device {

constexpr int kTailThreads = 1024;
static_assert(kTailThreads == kWarp * kWarp, "one warp joins the results of all warps");

struct TailBlock {
  Nearest* memory;  // shared, one a warp

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kTailThreads; }
  __device__ void sync() const { __syncthreads(); }

  template <typename Order>
  __device__ static Nearest least_of_warp(Nearest mine, const Order& closer) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const Nearest other{__shfl_xor_sync(kAllLanes, mine.cost, distance),
                          __shfl_xor_sync(kAllLanes, mine.place, distance)};
      if (closer(other, mine)) mine = other;
    }
    return mine;
  }

  // Every warp joins the results of all warps itself: one barrier less than handing the winner out.
  template <typename Order>
  __device__ Nearest least(Nearest mine, const Order& closer) const {
    mine = least_of_warp(mine, closer);
    __syncthreads();  // the previous results are read
    if (lane_index() == 0) memory[threadIdx.x / kWarp] = mine;
    __syncthreads();
    return least_of_warp(memory[lane_index()], closer);
  }
};

__global__ void __launch_bounds__(kTailThreads, 1) tail_kernel(Clusters c) {
  __shared__ Nearest memory[kWarp];
  finish_by_chain(c, TailBlock{memory});
}

}  // namespace hiexp::clustering::device
