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
#include "distribution.h"
#include "table.h"
#include "update.h"
#include "zero_rows.h"

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
// fast path needs no registers for it. Returns the number of zeros.
__device__ __noinline__ int exact_chunk(const Arguments& arguments, Shared<kThreads>& shared,
                                        Moments** target) {
  const Chunk chunk = own_chunk(arguments, target);
  Moments state;
#pragma unroll 1
  for (int i = threadIdx.x; i < chunk.n; i += kThreads) {
    update(state, element_of(chunk.dtype, chunk.data, i));
  }
  state = block_merge(state, shared);
  if (threadIdx.x < 32) store(*target, state);
  __syncthreads();
  if (threadIdx.x == 0) shared.bytes[0] = static_cast<double>(state.zeros);
  __syncthreads();
  return static_cast<int>(shared.bytes[0]);
}

// One block per chunk.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    paramstats_summarize_chunks(const Arguments __grid_constant__ arguments) {
  __shared__ Shared<kThreads> shared;
  __shared__ Moments* target;  // not in registers, which the fast path needs
  const Chunk chunk = own_chunk(arguments, &target);
  Moments state;
  int zeros;
  if (try_chunk_of(chunk, shared, state)) {
    __syncwarp();
    if (threadIdx.x < 32) store(target, state);
    zeros = static_cast<int>(state.zeros);
  } else {
    zeros = exact_chunk(arguments, shared, &target);
  }
  if (zeros > 0) find_zero_rows(arguments, zeros);
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

// ---- distributions -----------------------------------------------------------------------------

// One block per span. It must run after the chunks are summarized and before their states are
// merged, because it needs their means. Each warp counts the narrow range in bins of its own, all
// warps count the wide one together.
extern "C" __global__ void __launch_bounds__(kThreads, 5)
    paramstats_distribution_chunks(const DistributionTable __grid_constant__ arguments) {
  constexpr int kBins = 2 * kWide.bins, kWarps = kThreads / 32;
  static_assert(kWarps * 2 * kNarrow.bins <= kBins, "the bins of all warps fit");
  __shared__ Shared<kThreads> shared;
  __shared__ unsigned bins[kBins];
  const auto* entries = arguments.distributions;
  const uint32_t e = find_entry<&DistributionEntry::first_span>(entries, arguments.n, blockIdx.x);
  const DistributionEntry entry = entries[e];
  const Entry tensor = arguments.entries[entry.tensor];
  const DType dtype = tensor.dtype();
  const ExponentRange range = exponents_of(dtype);
  const int64_t size = chunk_size(tensor.numel(), dtype);
  const int64_t chunks = chunk_count(tensor.numel(), dtype), in_span = span_chunks(chunks);
  const int64_t begin = (blockIdx.x - entry.first_span) * in_span;
  const int64_t end = begin + in_span < chunks ? begin + in_span : chunks;
#pragma unroll 1
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const int own_bins = range.bins == kNarrow.bins ? 2 * range.bins : 0;
  HigherMoments merged;
  double mx[kMxWords] = {};
#pragma unroll 1
  for (int64_t index = begin; index < end; ++index) {
    const Moments* state =
        chunks == 1 ? arguments.rows + entry.tensor : arguments.states + tensor.first_chunk + index;
    const double pivot = __ldcg(&state->mean);
    const int64_t remaining = tensor.numel() - index * size;
    const Chunk chunk = {dtype,
                         static_cast<const char*>(tensor.data) + (index * size << log2_size(dtype)),
                         static_cast<int>(remaining < size ? remaining : size)};
    double s[kPowers] = {}, of_chunk[kMxWords];
    read_chunk(chunk, pivot, bins + threadIdx.x / 32 * own_bins, range.bins, range.first, shared, s,
               of_chunk);
#pragma unroll
    for (int k = 0; k < kMxWords; ++k) mx[k] += of_chunk[k];
    if (s[5] == 0) continue;
    HigherMoments moments =
        centered({s[0], s[1], s[2], s[3], s[4]}, static_cast<int64_t>(s[5]), pivot);
    if (!is_finite(s[4])) moments.abs_mean = scaled_abs_mean(chunk, s[5], shared);
    merged = merge(merged, moments);
  }
  if (threadIdx.x == 0) arguments.moments[blockIdx.x] = merged;
  __syncthreads();
  unsigned long long* counts = arguments.counts + entry.counts;
#pragma unroll
  for (int k = 0; k < kMxWords; ++k) {
    const auto count = static_cast<unsigned long long>(mx[k]);
    if (static_cast<int>(threadIdx.x) == k && count > 0) atomicAdd(counts + k, count);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * range.bins; i += kThreads) {
    unsigned long long count = bins[i];
    if (own_bins > 0) {
#pragma unroll
      for (int w = 1; w < kWarps; ++w) count += bins[w * own_bins + i];
    }
    if (count > 0) atomicAdd(counts + kMxWords + i, count);
  }
}

// One block per distribution: merges the moments of its spans in order, and copies the counts to
// host memory.
extern "C" __global__ void __launch_bounds__(kThreads, 5)
    paramstats_merge_distributions(const DistributionTable __grid_constant__ arguments) {
  __shared__ Shared<kThreads> shared;
  const DistributionEntry entry = arguments.distributions[blockIdx.x];
  const Entry tensor = arguments.entries[entry.tensor];
  const ExponentRange range = exponents_of(tensor.dtype());
  const auto spans = static_cast<uint32_t>(span_count(chunk_count(tensor.numel(), tensor.dtype())));
  const uint32_t run = (spans + kThreads - 1) / kThreads, begin = threadIdx.x * run;
  const uint32_t end = begin + run < spans ? begin + run : spans;
  HigherMoments state;
#pragma unroll 1
  for (uint32_t i = begin; i < end; ++i) {
    state = merge(state, arguments.moments[entry.first_span + i]);
  }
  state = block_merge(state, shared);
  auto* out =
      reinterpret_cast<DistributionHead*>(reinterpret_cast<char*>(arguments.rows) + entry.out);
  if (threadIdx.x == 0) {
    out->first = range.first;
    out->bins = range.bins;
    out->moments = state;
  }
  auto* words = reinterpret_cast<unsigned long long*>(out->mx);  // the counts follow
  const auto n = static_cast<int>(distribution_words(tensor.dtype()));
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads) words[i] = arguments.counts[entry.counts + i];
}

}  // namespace paramstats::cuda
