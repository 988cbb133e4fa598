// The CUDA kernels: compute one Moments per tensor, of any dtypes, and read the memory once. Device
// code only, without includes that NVRTC does not have.
//
// Every tensor is divided into chunks (table.h). `summarize_chunks` runs one block per chunk of all
// tensors of a launch. The state of a tensor with one chunk is written to its row at once.
// Otherwise `merge_chunks` merges the states of its chunks: a warp per group of 32 chunks, and for
// more groups the last of these warps merges the states of the groups. States are merged in the
// order of their index, and an integer counter alone decides which warp is the last. So results do
// not depend on the order of blocks and warps: they are bitwise the same on every run, and do not
// depend on the other tensors.
#pragma once

#include "chunk.h"
#include "table.h"

namespace paramstats::cuda {

// ---- find the tensor of a block or a warp ------------------------------------------------------

// With __grid_constant__, the address of the argument is that of the constant memory it is passed
// in. (Without, the compiler would copy it to local memory.)
__device__ inline const Entry* entries_of(const Arguments& arguments) {
  return arguments.entries != nullptr ? arguments.entries : arguments.inline_entries;
}

// Finds the last tensor whose `kFirst` is not after `index`: the one with this chunk or group,
// because tensors without groups are followed by one with the same first group. A warp compares 32
// tensors at a time.
template <uint32_t Entry::* kFirst>
__device__ inline uint32_t find_tensor(const Arguments& arguments, uint32_t index) {
  const Entry* entries = entries_of(arguments);
  const uint32_t lane = threadIdx.x % 32;
  uint32_t begin = 0, end = arguments.tensors;
  while (end - begin > 1) {
    const uint32_t step = (end - begin + 31) / 32;
    const uint32_t at = begin + lane * step;
    const bool before = at < end && entries[at].*kFirst <= index;
    const int last = __popc(__ballot_sync(kAllLanes, before)) - 1;
    begin += last * step;
    end = begin + step < end ? begin + step : end;
  }
  return begin;
}

// The chunk that this block reads. Lane 0 also sets *target, where the state is written.
__device__ inline Chunk own_chunk(const Arguments& arguments, Moments** target) {
  const uint32_t t = find_tensor<&Entry::first_chunk>(arguments, blockIdx.x);
  const Entry tensor = entries_of(arguments)[t];
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

// ---- states in memory --------------------------------------------------------------------------

// Stores lane 0's state with two instructions of its warp. A row is in host memory, and nine
// stores by one thread would be nine small transfers.
__device__ inline void store(Moments* to, const Moments& state) {
  const int64_t counts[] = {state.count, state.zeros, state.nans, state.pos_infs, state.neg_infs};
  const double values[] = {state.mean, state.m2, state.min, state.max};
  const int lane = threadIdx.x % 32;
  int64_t count = 0;
  double value = 0;
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    const int64_t of_lane_0 = __shfl_sync(kAllLanes, counts[k], 0);
    if (lane == k) count = of_lane_0;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const double of_lane_0 = __shfl_sync(kAllLanes, values[k], 0);
    if (lane == k) value = of_lane_0;
  }
  if (lane < 5) (&to->count)[lane] = count;
  if (lane < 4) (&to->mean)[lane] = value;
}

// Loads a state past the first-level cache, which may contain its value from before another warp
// of this launch changed it.
__device__ inline Moments load(const Moments* from) {
  Moments state;
  state.count = __ldcg(&from->count);
  state.zeros = __ldcg(&from->zeros);
  state.nans = __ldcg(&from->nans);
  state.pos_infs = __ldcg(&from->pos_infs);
  state.neg_infs = __ldcg(&from->neg_infs);
  state.mean = __ldcg(&from->mean);
  state.m2 = __ldcg(&from->m2);
  state.min = __ldcg(&from->min);
  state.max = __ldcg(&from->max);
  return state;
}

// ---- summarize one chunk -----------------------------------------------------------------------

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
  const uint32_t t = find_tensor<&Entry::first_group>(arguments, group);
  const Entry tensor = entries_of(arguments)[t];
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
