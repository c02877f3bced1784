// Exact agglomerative clustering on a GPU, for the methods whose clusters are centroids: device addresses and a stream
// in, merges out. Python has checked shape, dtype and memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "clustering/method.h"
#include "clustering/monitor.h"

namespace hiexp::clustering {

enum class Element { float16, float32, float64 };

struct DeviceRows {
  const void* data;  // (n, d) on the device, contiguous
  Element element;
  size_t n, d;
};

// Bytes of device memory that linkage_cuda needs beside the rows, on the current device.
size_t linkage_cuda_bytes(size_t n, size_t d);

// `workspace`: that many bytes on the device, aligned to 256, or nullptr: then the stream's pool gives them. Returns
// when the work is done. `tail`: the number of clusters that the chain finishes, at most kTailClusters; 0 leaves all to
// rounds, whose heights equal those of the CPU bit by bit. Throws std::invalid_argument for bad values,
// std::runtime_error for errors of CUDA.
std::vector<Merge> linkage_cuda(const DeviceRows& rows, Method method, Metric metric, double threshold, void* workspace,
                                cudaStream_t stream, int32_t tail, Monitor& monitor);

}  // namespace hiexp::clustering
