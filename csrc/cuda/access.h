// How the kernels find the tensor or update of a block, and access states in memory. A part of
// kernels.h.
#pragma once

#include "block.h"
#include "table.h"

namespace paramstats::cuda {

// ---- find the tensor of a block or a warp ------------------------------------------------------

// With __grid_constant__, the address of the argument is that of the constant memory it is passed
// in. (Without, the compiler would copy it to local memory.)
__device__ inline const Entry* entries_of(const Arguments& arguments) {
  return arguments.entries != nullptr ? arguments.entries : arguments.inline_entries;
}

// Finds the last of n > 0 entries whose `kFirst` is not after `index`: the one with this chunk or
// group, because entries without any are followed by one with the same first one. A warp compares
// 32 entries at a time.
template <auto kFirst, class E>
__device__ inline uint32_t find_entry(const E* entries, uint32_t n, uint32_t index) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t begin = 0, end = n;
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

}  // namespace paramstats::cuda
