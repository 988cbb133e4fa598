// The CUDA kernels: compute one Moments per tensor, of any dtypes, and up to four per update of an
// optimizer, and read the memory once. Device code only, without includes that NVRTC does not have.
//
// Every tensor is divided into chunks (table.h). `summarize_chunks` runs one block per chunk of all
// tensors of a launch, and `update_chunks` one per chunk of all updates, if there are any. The
// state of a tensor with one chunk is written to its row at once, as are the rows of such an
// update. Otherwise `merge_chunks` merges the states of its chunks: a warp per group of 32 chunks,
// and for more groups the last of these warps merges the states of the groups. States are merged in
// the order of their index, and an integer counter alone decides which warp is the last. So results
// do not depend on the order of blocks and warps: they are bitwise the same on every run, and do
// not depend on the other tensors.
#pragma once

#include "access.h"
#include "chunk.h"
#include "table.h"
#include "update.h"

namespace paramstats::cuda {

// ---- summarize one chunk -----------------------------------------------------------------------

// The chunk that this block reads. Lane 0 also sets *target, where the state is written.
__device__ inline Chunk own_chunk(const Arguments& arguments, Moments** target) {
  const Entry* entries = entries_of(arguments);
  const uint32_t t = find_entry<&Entry::first_chunk>(entries, arguments.size, blockIdx.x);
  const Entry tensor = entries[t];
  const DType dtype = tensor.dtype();
  const int log2_bytes = log2_chunk_bytes(tensor.numel(), dtype);
  const int64_t size = chunk_size(tensor.numel(), dtype);
  const int64_t index = blockIdx.x - tensor.first_chunk;
  const int64_t remaining = tensor.numel() - index * size;
  if (threadIdx.x == 0) {
    const bool is_only = tensor.numel() <= size;
    *target = is_only ? arguments.rows + t : arguments.states + blockIdx.x;
    if (index == 0 && !is_only) arguments.merged[t] = 0;  // for the next launch
  }
  return {dtype, static_cast<const char*>(tensor.data) + (index << log2_bytes),
          static_cast<int>(remaining < size ? remaining : size)};
}

// Summarizes this block's chunk element by element in float64: for NaN, infinities, and values
// whose squares float32 cannot represent. It is not inlined and finds its chunk again, so that the
// fast path needs no registers for it.
__device__ __noinline__ void exact_chunk(const Arguments& arguments, Shared<kThreads>& shared,
                                         Moments** target) {
  const Chunk chunk = own_chunk(arguments, target);
  Moments state;
#pragma unroll 1
  for (int i = threadIdx.x; i < chunk.n; i += kThreads) {
    update(state, element_of(chunk.dtype, chunk.data, i));
  }
  state = block_merge(state, shared);
  if (threadIdx.x < 32) store(*target, state);
}

// One block per chunk.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    paramstats_summarize_chunks(const Arguments __grid_constant__ arguments) {
  __shared__ Shared<kThreads> shared;
  __shared__ Moments* target;  // not in registers, which the fast path needs
  const Chunk chunk = own_chunk(arguments, &target);
  Moments state;
  if (!try_chunk_of(chunk, shared, state)) return exact_chunk(arguments, shared, &target);
  __syncwarp();
  if (threadIdx.x < 32) store(target, state);
}

// One block per chunk of an update.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    paramstats_update_chunks(const UpdateTable __grid_constant__ arguments) {
  __shared__ Shared<kThreads> shared;
  __shared__ UpdateChunk chunk;
  own_chunk(arguments, chunk);
  if (!try_update(chunk, shared)) exact_update(chunk, shared);
}

// ---- merge the states of a tensor's chunks -----------------------------------------------------

// Merges `n` states at distances of `stride` with a warp. A thread merges a run of them, then the
// states of the threads are merged, all in order. Lane 0 gets the result.
__device__ inline Moments merge_states(const Moments* states, uint32_t n, uint32_t stride) {
  const uint32_t run = (n + 31) / 32;
  const uint32_t begin = threadIdx.x % 32 * run;
  const uint32_t end = begin + run < n ? begin + run : n;
  Moments state;
  if (begin < end) {
    const Moments* next = states + static_cast<uint64_t>(begin) * stride;
    state = load(next);
#pragma unroll 1
    for (uint32_t i = begin + 1; i < end; ++i) state = merge(state, load(next += stride));
  }
  return warp_merge(state);
}

// Returns whether this warp is the last of a tensor's `groups` warps to call it. Then it may load
// the states that the others have stored: the fence before the counter makes a warp's stores
// visible before it is counted, and the fence after it keeps the loads that follow from running
// ahead of the count. __syncwarp extends both from lane 0, which counts, to the other lanes. The
// tests on a CPU cannot notice a missing fence.
__device__ inline bool is_last(uint32_t* merged, uint32_t groups) {
  __threadfence();
  __syncwarp();
  const bool last = threadIdx.x % 32 == 0 && atomicAdd(merged, 1u) == groups - 1;
  __threadfence();
  __syncwarp();
  return __ballot_sync(kAllLanes, last) != 0;
}

// One warp per group of chunks. Its result replaces the state of the group's first chunk, which no
// other warp reads before this one is counted.
extern "C" __global__ void __launch_bounds__(kMergeThreads)
    paramstats_merge_chunks(const Arguments __grid_constant__ arguments) {
  const uint32_t group = blockIdx.x * (kMergeThreads / 32) + threadIdx.x / 32;
  if (group >= arguments.groups) return;
  const Entry* entries = entries_of(arguments);
  const uint32_t t = find_entry<&Entry::first_group>(entries, arguments.size, group);
  const Entry tensor = entries[t];
  const auto chunks = static_cast<uint32_t>(chunk_count(tensor.numel(), tensor.dtype()));
  const auto groups = static_cast<uint32_t>(group_count(chunks));
  const uint32_t first = (group - tensor.first_group) * kGroup;
  Moments* states = arguments.states + tensor.first_chunk + first;
  uint32_t n = chunks - first < kGroup ? chunks - first : kGroup, stride = 1;
  bool is_row = groups == 1;
#pragma unroll 1
  for (;;) {
    const Moments state = merge_states(states, n, stride);
    store(is_row ? arguments.rows + t : states, state);
    if (is_row || !is_last(arguments.merged + t, groups)) return;
    states -= first;
    n = groups;
    stride = kGroup;
    is_row = true;
  }
}

}  // namespace paramstats::cuda
