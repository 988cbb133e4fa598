// The arguments of the kernels; for host and device.
#pragma once

#include "../dtypes.h"
#include "../moments.h"

namespace paramstats::cuda {

constexpr int kThreads = 128;  // of a block that reads a chunk
constexpr int kMergeThreads = 512;

constexpr int kChunkBytes = 1 << 17;  // bytes of a tensor that one thread block reads

// A tensor without gaps.
struct TensorView {
  const void* data;  // aligned to its elements
  int64_t numel;
  DType dtype;
};

PARAMSTATS_HD constexpr int64_t chunk_size(DType dtype) {  // elements
  return kChunkBytes >> log2_size(dtype);
}

PARAMSTATS_HD inline int64_t chunk_count(const TensorView& t) {
  return ((t.numel << log2_size(t.dtype)) + kChunkBytes - 1) / kChunkBytes;
}

// All tensors of a launch, in device memory. first_chunk[t] is the number of chunks of all tensors
// before tensors[t].
struct Table {
  const int64_t* first_chunk;
  const TensorView* tensors;
  int count;
};

}  // namespace paramstats::cuda
