// Group advantage on a GPU: one cooperative launch on the caller's stream; device pointers in, no synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "advantage/batch.h"

namespace hiexp::advantage {

// Blocks of the launch on the current device: all of them run at once, which a grid-wide barrier needs.
int64_t grid_blocks(int64_t rows, int64_t tokens);

// `workspace`: workspace_bytes(rows, grid_blocks(rows, tokens.total)) bytes, aligned to 64.
template <typename Real>
void group_advantage_cuda(const Batch<Real>& batch, const Options& options, const Result<Real>& result, void* workspace,
                          cudaStream_t stream);

}  // namespace hiexp::advantage
