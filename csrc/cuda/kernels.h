// The CUDA kernels: compute one Moments per tensor, of any dtypes, and read the memory once. Device
// code only, without includes that NVRTC does not have.
//
// Every tensor is split into chunks of kChunkBytes. `summarize_chunks` runs one block per chunk of
// all tensors of a launch and writes one state per chunk. `merge_chunks` runs one block per tensor
// and merges its states in order of their index. There are no atomics, and no result depends on the
// order of the blocks: results are bitwise the same on every run and do not depend on the other
// tensors.
#pragma once

#include "chunk.h"
#include "table.h"

namespace paramstats::cuda {

// ---- find the chunk of a block ---------------------------------------------------------------

// Finds the tensor of a chunk: the last tensor whose first chunk is not after it. A warp compares
// 32 tensors at a time.
__device__ inline int find_tensor(const Table& table, int64_t chunk) {
  const int lane = threadIdx.x % 32;
  int begin = 0, end = table.count;
  while (end - begin > 1) {
    const int step = (end - begin + 31) / 32;
    const int at = begin + lane * step;
    const bool before = at < end && table.first_chunk[at] <= chunk;
    const int last = __popc(__ballot_sync(kAllLanes, before)) - 1;
    begin += last * step;
    end = begin + step < end ? begin + step : end;
  }
  return begin;
}

// The chunk that this block reads.
__device__ inline Chunk own_chunk(const Table& table) {
  const int64_t index = blockIdx.x;
  const int t = find_tensor(table, index);
  const TensorView tensor = table.tensors[t];
  const int64_t before = index - table.first_chunk[t];
  const int64_t size = chunk_size(tensor.dtype);
  const int64_t remaining = tensor.numel - before * size;
  return {tensor.dtype, static_cast<const char*>(tensor.data) + before * kChunkBytes,
          static_cast<int>(remaining < size ? remaining : size)};
}

// ---- summarize one chunk --------------------------------------------------------------------

// Summarizes this block's chunk element by element in float64: for NaN, infinities, and values
// whose squares float32 cannot represent. It is not inlined and finds its chunk again, so that the
// fast path needs no registers for it.
__device__ __noinline__ void exact_chunk(Table table, Shared<kThreads>& shared, Moments* states) {
  const Chunk chunk = own_chunk(table);
  Moments state;
#pragma unroll 1
  for (int i = threadIdx.x; i < chunk.n; i += kThreads) {
    update(state, element_of(chunk.dtype, chunk.data, i));
  }
  state = block_merge(state, shared);
  if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// ---- kernels --------------------------------------------------------------------------------

// One block per chunk.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    paramstats_summarize_chunks(Table table, Moments* states) {
  __shared__ Shared<kThreads> shared;
  Moments state;
  if (!try_chunk_of(own_chunk(table), shared, state)) return exact_chunk(table, shared, states);
  if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// One block per tensor. Each thread merges a run of adjacent chunks; then the states of the threads
// are merged in order.
extern "C" __global__ void __launch_bounds__(kMergeThreads)
    paramstats_merge_chunks(Table table, const Moments* states, Moments* rows) {
  __shared__ Shared<kMergeThreads> shared;
  const int t = blockIdx.x;
  const int64_t chunks = chunk_count(table.tensors[t]);
  const Moments* chunk_states = states + table.first_chunk[t];
  const int64_t run = (chunks + kMergeThreads - 1) / kMergeThreads;
  const int64_t begin = threadIdx.x * run;
  const int64_t end = begin + run < chunks ? begin + run : chunks;
  Moments state;
  if (begin < end) {
    state = chunk_states[begin];
    Moments next = chunk_states[begin + 1 < end ? begin + 1 : begin];
#pragma unroll 1
    for (int64_t c = begin + 1; c < end; ++c) {
      const Moments current = next;
      next = chunk_states[c + 1 < end ? c + 1 : c];  // loaded while the current one is merged
      state = merge(state, current);
    }
  }
  if (chunks > 32) {
    state = block_merge(state, shared);
  } else if (threadIdx.x < 32) {
    state = warp_merge(state);
  }
  if (threadIdx.x == 0) rows[t] = state;
}

}  // namespace paramstats::cuda
