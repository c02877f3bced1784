// The candidate pass: products of rows with all listed columns on tensor cores, and in the same kernel the kKeep
// smallest lower bounds of every row. Products are never stored in global memory.
//
// Work mapping: a block takes 128 rows and a range of columns, 128 at a time. Eight warps share the tile as 2 x 4 parts
// of 64 x 32; each holds 4 x 4 products of 16 x 8 in registers. Both operands come through shared memory in steps of 32
// halves, three steps in flight (cp.async). Rows of 40 halves make ldmatrix free of bank conflicts. A finished tile
// goes to shared memory, where a warp takes a row at a time: most rows have nothing below their last bound. Symmetry is
// not used: a product serves its row only, which doubles the products and spares locks on lists.
#pragma once

#include "clustering/cuda/tensor_tile.h"
#include "clustering/cuda/warp.cuh"

namespace hiexp::clustering::device {

constexpr int kStages = 3;
constexpr int kHalfStride = kDepthStep + 8;
constexpr int kDotStride = kTile + 8;  // floats; the stores of half a warp fall into different banks
constexpr int kPartRows = 64, kPartColumns = 32;

struct BoundTile {
  union {
    uint16_t halves[kStages][2][kTile * kHalfStride];  // rows, columns
    float dots[kTile * kDotStride];
  };
  Approximate lists[kTile][kKeep];
  RowBound bounds[2][kTile];
  int32_t slots[2][kTile];
};

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

__device__ inline void load_matrices(unsigned (&to)[4], const uint16_t* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from))
               : "memory");
}

__device__ inline void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One step along k of both operands into a stage, 16 bytes a copy.
__device__ inline void load_step(const Clusters& c, BoundTile& tile, int step) {
  constexpr int kPieces = kDepthStep / 8;  // of a row
  for (int piece = static_cast<int>(threadIdx.x); piece < 2 * kTile * kPieces; piece += kThreads) {
    const int side = piece / (kTile * kPieces), row = piece / kPieces % kTile, part = piece % kPieces;
    const int32_t slot = tile.slots[side][row];
    // An unused row loads some row; its products are not looked at.
    const uint16_t* from = c.halves + int64_t{slot < 0 ? 0 : slot} * c.depth + step * kDepthStep + part * 8;
    copy_async(tile.halves[step % kStages][side] + row * kHalfStride + part * 8, from);
  }
}

using Sums = float[kPartRows / 16][kPartColumns / 8][4];

__device__ inline void multiply_step(const BoundTile& tile, int stage, int first_row, int first_column, Sums& sums) {
  const int lane = lane_index();
  for (int k = 0; k < kDepthStep; k += 16) {
    unsigned a[kPartRows / 16][4], b[kPartColumns / 16][4];
#pragma unroll
    for (int m = 0; m < kPartRows / 16; ++m) {
      const int row = first_row + 16 * m + tile::a_row(lane);
      load_matrices(a[m], tile.halves[stage][0] + row * kHalfStride + k + tile::a_k(lane));
    }
#pragma unroll
    for (int n = 0; n < kPartColumns / 16; ++n) {
      const int column = first_column + 16 * n + tile::b_column(lane);
      load_matrices(b[n], tile.halves[stage][1] + column * kHalfStride + k + tile::b_k(lane));
    }
#pragma unroll
    for (int m = 0; m < kPartRows / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kPartColumns / 8; ++n) {
        multiply(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

// Products of the tile's rows and columns, into tile.dots.
__device__ inline void multiply_tile(const Clusters& c, BoundTile& tile) {
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_row = warp / 4 * kPartRows, first_column = warp % 4 * kPartColumns;
  const int steps = c.depth / kDepthStep;
  Sums sums = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_step(c, tile, step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the step has arrived for all, and all are done with the stage that is loaded next
    if (step + kStages - 1 < steps) load_step(c, tile, step + kStages - 1);
    commit_copies();
    multiply_step(tile, step % kStages, first_row, first_column, sums);
  }
  wait_copies<0>();
  __syncthreads();  // `dots` lies where the stages were
#pragma unroll
  for (int m = 0; m < kPartRows / 16; ++m) {
#pragma unroll
    for (int n = 0; n < kPartColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = first_row + 16 * m + tile::c_row(lane, i), column = first_column + 8 * n;
        float* to = tile.dots + row * kDotStride + column + tile::c_column(lane, i);
        *reinterpret_cast<float2*>(to) = make_float2(sums[m][n][i], sums[m][n][i + 1]);
      }
    }
  }
}

__device__ inline void load_side(const Clusters& c, BoundTile& tile, int side, const int32_t* slots, int64_t first,
                                 int64_t count) {
  for (int r = static_cast<int>(threadIdx.x); r < kTile; r += kThreads) {
    const int32_t slot = first + r < count ? slots[first + r] : -1;
    tile.slots[side][r] = slot;
    tile.bounds[side][r] = c.bounds[slot < 0 ? 0 : slot];
  }
}

// A warp takes 16 rows, a lane every 32nd column.
__device__ inline void update_lists(const Clusters& c, BoundTile& tile) {
  constexpr int kMine = kTile / kWarp;
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp;
  RowBound columns[kMine];
  int32_t slots[kMine];
#pragma unroll
  for (int x = 0; x < kMine; ++x) {
    columns[x] = tile.bounds[1][lane + kWarp * x];
    slots[x] = tile.slots[1][lane + kWarp * x];
  }
  for (int r = warp; r < kTile; r += kWarps) {
    const int32_t row = tile.slots[0][r];
    if (row < 0) continue;
    WarpList<Approximate> list;
    list.mine = tile.lists[r][lane < kKeep ? lane : 0];
    bool changed = false;
#pragma unroll
    for (int x = 0; x < kMine; ++x) {
      const float dot = tile.dots[r * kDotStride + lane + kWarp * x];
      const Approximate candidate{cost_bound(dot, tile.bounds[0][r], columns[x], c.method == Method::ward), slots[x]};
      // Empty slots are infinitely far.
      const bool usable = slots[x] >= 0 && slots[x] != row && candidate.cost < HUGE_VALF;
      changed |= list.offer(candidate, usable, row);
    }
    if (changed && lane < kKeep) tile.lists[r][lane] = list.mine;
  }
}

__device__ inline void write_lists(const Clusters& c, const BoundTile& tile, const Splits& split, int64_t item) {
  const int lane = lane_index();
  for (int r = static_cast<int>(threadIdx.x) / kWarp; r < kTile; r += kWarps) {
    if (tile.slots[0][r] < 0) continue;
    const WarpList<Approximate> list{tile.lists[r][lane < kKeep ? lane : 0]};
    if (split.splits == 1) {
      list.store_list(c, tile.slots[0][r]);
    } else if (lane < kKeep) {
      c.approximate_parts[(item * kTile + r) * kKeep + lane] = list.mine;
    }
  }
}

// Two blocks share a multiprocessor where its shared memory allows: one multiplies while the other sorts.
__global__ void __launch_bounds__(kThreads, 2) scan_bounds_kernel(Clusters c, const int32_t* rows, Span span) {
  extern __shared__ __align__(16) unsigned char memory[];
  BoundTile& tile = *reinterpret_cast<BoundTile*>(memory);
  const Splits split = Splits::of(span.end(), kTile, c.listed, kTile, c.grid);
  const int64_t tiles = (c.listed + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < split.items(); item += gridDim.x) {
    const int64_t part = item % split.splits;
    __syncthreads();  // the previous item is written
    load_side(c, tile, 0, rows, item / split.splits * kTile, span.end());
    for (int x = static_cast<int>(threadIdx.x); x < kTile * kKeep; x += kThreads) {
      (&tile.lists[0][0])[x] = no_candidate<Approximate>();
    }
    for (int64_t t = split.begin(part, tiles); t < split.begin(part + 1, tiles); ++t) {
      __syncthreads();  // the previous tile is sorted in
      load_side(c, tile, 1, c.columns, t * kTile, c.listed);
      __syncthreads();
      multiply_tile(c, tile);
      __syncthreads();
      update_lists(c, tile);
    }
    __syncthreads();
    write_lists(c, tile, split, item);
  }
}

}  // namespace hiexp::clustering::device
