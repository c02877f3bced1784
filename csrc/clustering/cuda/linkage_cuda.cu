// See linkage_cuda.h. The steps are those of driver.h; here are the launches. A launch whose number of items only the
// device knows takes a grid of fixed size, whose threads stride over the items. Compiled without fused multiply-adds,
// so that sums round as they do on the CPU; where the CPU fuses, the code says fma.
#include "clustering/cuda/driver.h"
#include "clustering/cuda/linkage_cuda.h"
#include "clustering/cuda/scan_bounds.cuh"
#include "clustering/cuda/scan_costs.cuh"
#include "clustering/cuda/tail.cuh"
#include "cuda_device.h"

namespace hiexp::clustering {

namespace {

using namespace device;

constexpr int kBlocksPerProcessor = 8;

template <typename Step>
__global__ void __launch_bounds__(kThreads) each_kernel(Span span, Step step) {
  const int64_t end = span.end(), stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = span.begin() + int64_t{blockIdx.x} * kThreads + threadIdx.x; i < end; i += stride) step(i);
}

template <typename Step>
__global__ void __launch_bounds__(kThreads, 3) teams_kernel(Span span, Step step) {
  const int64_t end = span.end(), stride = int64_t{gridDim.x} * kWarps;
  for (int64_t i = span.begin() + int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < end; i += stride) {
    step(Warp{}, i);
  }
}

template <typename Step>
__global__ void __launch_bounds__(kThreads) octets_kernel(Span span, int per_item, Step step) {
  const int64_t end = span.end() * per_item, stride = int64_t{gridDim.x} * (kThreads / 8);
  for (int64_t i = span.begin() * per_item + int64_t{blockIdx.x} * (kThreads / 8) + threadIdx.x / 8; i < end;
       i += stride) {
    step(Octet{}, i);
  }
}

int processors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Blocks of a scan that run at once.
int scan_grid() {
  const auto bytes = static_cast<int>(sizeof(BoundTile));
  check_cuda(cudaFuncSetAttribute(scan_bounds_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "linkage: shared memory of the candidate pass");
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scan_bounds_kernel, kThreads, sizeof(BoundTile)),
             "linkage: occupancy of the candidate pass");
  return processors() * std::max(blocks, 1);
}

class CudaBackend {
 public:
  explicit CudaBackend(cudaStream_t stream) : stream_(stream), most_blocks_(processors() * kBlocksPerProcessor) {}

  template <typename T>
  void read(T* to, const T* from, int64_t count) const {
    copy(to, from, count, cudaMemcpyDeviceToHost);
  }
  template <typename T>
  void write(T* to, const T* from, int64_t count) const {
    copy(to, from, count, cudaMemcpyHostToDevice);
  }
  template <typename T>
  void zero(T* to, int64_t count) const {
    check_cuda(cudaMemsetAsync(to, 0, static_cast<size_t>(count) * sizeof(T), stream_), "linkage: clearing memory");
  }
  void wait() const { check_cuda(cudaStreamSynchronize(stream_), "linkage"); }

  template <typename Step>
  void each(const Span& span, const Step& step) const {
    if (span.most > 0) each_kernel<<<blocks(span.most, kThreads), kThreads, 0, stream_>>>(span, step);
    check_launch();
  }
  template <typename Step>
  void teams(const Span& span, const Step& step) const {
    if (span.most > 0) teams_kernel<<<blocks(span.most, kWarps), kThreads, 0, stream_>>>(span, step);
    check_launch();
  }
  template <typename Step>
  void octets(const Span& span, int per_item, const Step& step) const {
    const unsigned grid = blocks(span.most * per_item, kThreads / 8);
    if (span.most > 0) octets_kernel<<<grid, kThreads, 0, stream_>>>(span, per_item, step);
    check_launch();
  }

  void tail(const Clusters& c) const {
    tail_kernel<<<1, kTailThreads, 0, stream_>>>(c);
    check_launch();
  }

  void scan_bounds(const Clusters& c, const int32_t* rows, const Span& span) const {
    const auto grid = static_cast<unsigned>(c.grid);
    scan_bounds_kernel<<<grid, kThreads, sizeof(BoundTile), stream_>>>(c, rows, span);
    join_parts_kernel<<<grid, kThreads, 0, stream_>>>(c, rows, span, kTile, kTile, c.approximate_parts);
    check_launch();
  }
  void scan_costs(const Clusters& c, const int32_t* rows, const Span& span) const {
    const auto grid = static_cast<unsigned>(c.grid);
    scan_costs_kernel<<<grid, kThreads, 0, stream_>>>(c, rows, span);
    join_parts_kernel<<<grid, kThreads, 0, stream_>>>(c, rows, span, kCostRows, kCostColumns, c.exact_parts);
    check_launch();
  }

 private:
  unsigned blocks(int64_t items, int64_t per_block) const {
    return static_cast<unsigned>(std::min<int64_t>((items + per_block - 1) / per_block, most_blocks_));
  }
  template <typename T>
  void copy(T* to, const T* from, int64_t count, cudaMemcpyKind kind) const {
    check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(T), kind, stream_), "linkage: copy");
    wait();
  }
  static void check_launch() { check_cuda(cudaGetLastError(), "linkage: launch"); }

  cudaStream_t stream_;
  int64_t most_blocks_;
};

// The caller's block, or one from the stream's pool that goes back when the run is over, however it ends.
class Workspace {
 public:
  Workspace(void* given, size_t bytes, cudaStream_t stream)
      : memory_(given), stream_(stream), owned_(given == nullptr) {
    if (owned_) check_cuda(cudaMallocAsync(&memory_, bytes, stream), "linkage: workspace");
  }
  ~Workspace() {
    if (owned_) cudaFreeAsync(memory_, stream_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* memory() const { return memory_; }

 private:
  void* memory_;
  cudaStream_t stream_;
  bool owned_;
};

}  // namespace

size_t linkage_cuda_bytes(size_t n, size_t d) {
  Clusters clusters{};
  return lay_out(clusters, nullptr, n, d, scan_grid());
}

std::vector<Merge> linkage_cuda(const DeviceRows& rows, Method method, Metric metric, double threshold, void* workspace,
                                cudaStream_t stream, int32_t tail, Monitor& monitor) {
  if (tail < 0 || tail > kTailClusters)
    throw std::invalid_argument("tail: expected 0 to " + std::to_string(kTailClusters));
  Clusters clusters{};
  const int grid = scan_grid();
  const Workspace memory(workspace, lay_out(clusters, nullptr, rows.n, rows.d, grid, tail), stream);
  lay_out(clusters, memory.memory(), rows.n, rows.d, grid, tail);
  CudaBackend backend(stream);
  Driver<CudaBackend> driver(backend, clusters, method, metric, threshold, monitor);
  const auto width = static_cast<int64_t>(rows.d);
  if (rows.element == Element::float16) return driver.run(static_cast<const Half*>(rows.data), width);
  if (rows.element == Element::float32) return driver.run(static_cast<const float*>(rows.data), width);
  return driver.run(static_cast<const double*>(rows.data), width);
}

}  // namespace hiexp::clustering
