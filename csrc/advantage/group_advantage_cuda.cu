// One cooperative launch, a thread to each row, grid-wide barriers between the steps of phases.h.
//
// Ascending labels: one barrier. Every run of equal labels is scored by its first thread before it is known whether all
// labels ascend; if they do not (or a run is too long for one thread), the table path writes everything again behind
// four more barriers. No result depends on timing, see formula.h.
#include <cooperative_groups.h>

#include <algorithm>

#include "advantage/group_advantage_cuda.h"
#include "advantage/phases.h"
#include "cuda_device.h"

namespace hiexp::advantage {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kLongestRun = 128;     // rows one thread goes through three times; an estimate, not measured
constexpr int64_t kTokensPerThread = 8;  // where the grid is sized for the token output

enum Note : int { kUnusable, kBadOffset, kFallback, kNotes };

template <typename Combine>
__device__ int64_t warp_combine(int64_t value, Combine combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

struct Plus {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};
struct Least {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};
struct Greatest {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? b : a; }
};

// Additions of many threads. Where all lanes of a warp add to one place, the warp adds once.
struct AtomicAdd {
  bool together;

  __device__ bool is_speaker() const { return !together || threadIdx.x % kWarp == 0; }
  __device__ void plus(int64_t* to, int64_t value) const {
    if (together) value = warp_combine(value, Plus{});
    if (is_speaker() && value != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
    }
  }
  __device__ void lower(int64_t* to, int64_t value) const {
    if (together) value = warp_combine(value, Least{});
    if (is_speaker()) atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(value));
  }
  __device__ void raise(int64_t* to, int64_t value) const {
    if (together) value = warp_combine(value, Greatest{});
    if (is_speaker()) atomicMax(reinterpret_cast<long long*>(to), static_cast<long long>(value));
  }
};

struct AtomicSwap {
  __device__ int32_t operator()(int32_t* entry, int32_t row) const { return atomicCAS(entry, -1, row); }
};

__device__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * kThreads; }
__device__ int64_t grid_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// The least of each note over the block, valid in every thread.
__device__ void block_least(int64_t (&notes)[kNotes], int64_t (&scratch)[kNotes][kThreads / kWarp]) {
  for (int note = 0; note < kNotes; ++note) {
    const int64_t least = warp_combine(notes[note], Least{});
    if (threadIdx.x % kWarp == 0) scratch[note][threadIdx.x / kWarp] = least;
  }
  __syncthreads();
  for (int note = 0; note < kNotes; ++note) {
    notes[note] = warp_combine(scratch[note][threadIdx.x % (kThreads / kWarp)], Least{});
  }
  __syncthreads();  // scratch is used again
}

// Scores runs, clears the table, and takes down what is wrong with the rows; `notes` of this thread.
template <typename Real>
__device__ void first_step(const Batch<Real>& batch, const Options& options, const Result<Real>& result,
                           const Workspace& workspace, int64_t (&notes)[kNotes]) {
  for (int64_t slot = grid_thread(); slot < workspace.capacity; slot += grid_threads()) workspace.table[slot] = -1;
  if (grid_thread() == 0) workspace.groups[batch.rows] = empty_accumulator();
  if (needs_table(options)) notes[kFallback] = 0;
  for (int64_t row = grid_thread(); row < batch.rows; row += grid_threads()) {
    if (!is_usable(batch.rewards[row])) notes[kUnusable] = Least{}(notes[kUnusable], row);
    notes[kBadOffset] = Least{}(notes[kBadOffset], bad_offset(batch.tokens, row, batch.rows));
    if (needs_table(options) || !starts_run(batch.labels, row)) continue;
    const int64_t end = end_of_run(batch.labels, row, batch.rows, kLongestRun);
    if (descends(batch.labels, row) || end - row > kLongestRun) {
      notes[kFallback] = 0;
    } else {
      score_run(batch, row, end, options, result);
    }
  }
}

// One pass of the table path. Whole warps stay in the loop, so that lanes can add together.
template <typename Real, typename Pass>
__device__ void for_each_row(const Batch<Real>& batch, const Workspace& workspace, bool with_batch, const Pass& pass) {
  for (int64_t row = grid_thread(); row - threadIdx.x % kWarp < batch.rows; row += grid_threads()) {
    const bool valid = row < batch.rows;
    const bool whole_warp = __all_sync(kAllLanes, valid);
    const int32_t group = valid ? workspace.group_of[row] : -1;
    const bool together = whole_warp && __all_sync(kAllLanes, group == __shfl_sync(kAllLanes, group, 0));
    if (!valid) continue;
    const double reward = batch.rewards[row];
    pass(AtomicAdd{together}, &workspace.groups[group], row, reward);
    if (with_batch) pass(AtomicAdd{whole_warp}, &workspace.groups[batch.rows], row, reward);
  }
}

template <typename Real>
__device__ void score_by_table(const cg::grid_group& grid, const Batch<Real>& batch, const Options& options,
                               const Result<Real>& result, const Workspace& workspace) {
  const bool with_batch = options.scale == Scale::kBatch;
  for (int64_t row = grid_thread(); row < batch.rows; row += grid_threads()) {
    workspace.group_of[row] = claim(AtomicSwap{}, batch.labels, row, workspace);
    if (workspace.group_of[row] == row) workspace.groups[row] = empty_accumulator();
  }
  grid.sync();
  for_each_row(batch, workspace, with_batch, [](const AtomicAdd& add, Accumulator* group, int64_t row, double reward) {
    add_extent(add, group, row, reward);
  });
  grid.sync();
  for_each_row(batch, workspace, with_batch, [](const AtomicAdd& add, Accumulator* group, int64_t, double reward) {
    add_position(add, group, reward);
  });
  grid.sync();
  for_each_row(batch, workspace, with_batch, [](const AtomicAdd& add, Accumulator* group, int64_t, double reward) {
    add_square(add, group, reward);
  });
  grid.sync();
  const double deviation = with_batch ? moments_of(workspace.groups[batch.rows], options.ddof).deviation : 0.0;
  for (int64_t row = grid_thread(); row < batch.rows; row += grid_threads()) {
    write_row_from_table(batch, row, workspace, deviation, options, result);
  }
}

// A warp to each rollout.
template <typename Real>
__device__ void spread_over_tokens(const Batch<Real>& batch, const Result<Real>& result) {
  for (int64_t row = grid_thread() / kWarp; row < batch.rows; row += grid_threads() / kWarp) {
    const TokenRange range = tokens_of(batch.tokens, row);
    const Real value = result.advantages[row];
    for (int64_t token = range.begin + threadIdx.x % kWarp; token < range.end; token += kWarp) {
      result.tokens[token] = batch.tokens.mask[token] ? value : Real{0};
    }
  }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads)
    group_advantage_kernel(Batch<Real> batch, Options options, Result<Real> result, Workspace workspace) {
  __shared__ int64_t scratch[kNotes][kThreads / kWarp];
  const cg::grid_group grid = cg::this_grid();
  int64_t notes[kNotes] = {kNone, kNone, kNone};
  first_step(batch, options, result, workspace, notes);
  block_least(notes, scratch);
  if (threadIdx.x == 0) {
    for (int note = 0; note < kNotes; ++note) workspace.block_notes[blockIdx.x * kNotes + note] = notes[note];
  }
  grid.sync();

  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    for (int note = 0; note < kNotes; ++note) {
      notes[note] = Least{}(notes[note], workspace.block_notes[block * kNotes + note]);
    }
  }
  block_least(notes, scratch);
  if (grid_thread() == 0) {
    result.notes[0] = notes[kUnusable] == kNone ? -1 : notes[kUnusable];
    result.notes[1] = notes[kBadOffset] == kNone ? -1 : notes[kBadOffset];
  }
  if (notes[kFallback] != kNone) score_by_table(grid, batch, options, result, workspace);
  if (batch.tokens.total == 0) return;
  if (notes[kFallback] != kNone) grid.sync();
  spread_over_tokens(batch, result);
}

}  // namespace

int64_t grid_blocks(int64_t rows, int64_t tokens) {
  int device = 0, processors = 0, of_float = 0, of_double = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const char* const what = "cudaOccupancyMaxActiveBlocksPerMultiprocessor";
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_float, group_advantage_kernel<float>, kThreads, 0),
             what);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_double, group_advantage_kernel<double>, kThreads, 0),
             what);
  const int64_t most = int64_t{processors} * std::min(of_float, of_double);
  const int64_t wanted = std::max(rows, (tokens + kTokensPerThread - 1) / kTokensPerThread);
  return std::max<int64_t>(1, std::min((wanted + kThreads - 1) / kThreads, most));
}

template <typename Real>
void group_advantage_cuda(const Batch<Real>& batch, const Options& options, const Result<Real>& result, void* workspace,
                          cudaStream_t stream) {
  const int64_t blocks = grid_blocks(batch.rows, batch.tokens.total);
  Workspace carved = carve(workspace, batch.rows, blocks);
  void* arguments[] = {const_cast<Batch<Real>*>(&batch), const_cast<Options*>(&options),
                       const_cast<Result<Real>*>(&result), &carved};
  check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&group_advantage_kernel<Real>),
                                         dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream),
             "group_advantage: launch");
}

template void group_advantage_cuda<float>(const Batch<float>&, const Options&, const Result<float>&, void*,
                                          cudaStream_t);
template void group_advantage_cuda<double>(const Batch<double>&, const Options&, const Result<double>&, void*,
                                           cudaStream_t);

}  // namespace hiexp::advantage
