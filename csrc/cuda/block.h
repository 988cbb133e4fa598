// Adds sums and merges states over the threads of a block, always in the same order.
#pragma once

#include "../details.h"
#include "../moments.h"
#include "packed.h"

namespace paramstats::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Minimum and maximum of two elements. If one is NaN, the result is not used.
__device__ inline float smaller(float a, float b) { return fminf(a, b); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double smaller(double a, double b) { return fmin(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// The sums of a thread, a warp or a block.
template <class L>
struct Sums {
  double sum = 0, sum_sq = 0;
  typename L::Lane min, max;
  typename L::Count zeros = 0;
};

template <class L>
__device__ inline void add(Sums<L>& a, const Sums<L>& b) {
  a.sum += b.sum;
  a.sum_sq += b.sum_sq;
  a.min = smaller(a.min, b.min);
  a.max = larger(a.max, b.max);
  a.zeros += b.zeros;
}

// Shared memory for exchange between the warps of a block; of type double for its alignment.
template <int kBlock>
struct Shared {
  static constexpr int kWarps = kBlock / 32;
  double bytes[kWarps * sizeof(Moments) / sizeof(double)];
};

// Adds the sums of all threads in a fixed order. Every thread gets the result.
template <class L, int kBlock>
__device__ inline ShiftedSums block_sums(Sums<L> s, Shared<kBlock>& shared) {
  constexpr int kWarps = Shared<kBlock>::kWarps;
  int thread = threadIdx.x;
  recompute(thread);  // or the address of a warp's sums would need a register from the start
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Sums<L> other;
    other.sum = __shfl_xor_sync(kAllLanes, s.sum, lanes);
    other.sum_sq = __shfl_xor_sync(kAllLanes, s.sum_sq, lanes);
    other.min = __shfl_xor_sync(kAllLanes, s.min, lanes);
    other.max = __shfl_xor_sync(kAllLanes, s.max, lanes);
    other.zeros = __shfl_xor_sync(kAllLanes, s.zeros, lanes);
    add(s, other);
  }
  auto* warps = reinterpret_cast<Sums<L>*>(shared.bytes);
  static_assert(sizeof(Sums<L>) * kWarps <= sizeof(shared.bytes), "the sums of all warps fit");
  __syncthreads();  // all threads have read the previous contents
  if (thread % 32 == 0) warps[thread / 32] = s;
  __syncthreads();
  Sums<L> all = warps[0];
#pragma unroll 1
  for (int w = 1; w < kWarps; ++w) add(all, warps[w]);
  return {all.sum, all.sum_sq, all.min, all.max, static_cast<int64_t>(all.zeros)};
}

// Adds kN values of all threads in a fixed order. Every thread gets the results.
template <int kN, int kBlock>
__device__ inline void block_add(double (&x)[kN], Shared<kBlock>& shared) {
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int k = 0; k < kN; ++k) x[k] += __shfl_xor_sync(kAllLanes, x[k], lanes);
  }
  static_assert(sizeof(x) * Shared<kBlock>::kWarps <= sizeof(shared.bytes));
  __syncthreads();  // all threads have read the previous contents
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    if (threadIdx.x % 32 == 0) shared.bytes[threadIdx.x / 32 * kN + k] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    x[k] = shared.bytes[k];
#pragma unroll 1
    for (int w = 1; w < Shared<kBlock>::kWarps; ++w) x[k] += shared.bytes[w * kN + k];
  }
}

// The state of the lane that is `lanes_up` above this one.
__device__ inline Moments from_lane(const Moments& a, int lanes_up) {
  Moments b;
  b.count = __shfl_down_sync(kAllLanes, a.count, lanes_up);
  b.zeros = __shfl_down_sync(kAllLanes, a.zeros, lanes_up);
  b.nans = __shfl_down_sync(kAllLanes, a.nans, lanes_up);
  b.pos_infs = __shfl_down_sync(kAllLanes, a.pos_infs, lanes_up);
  b.neg_infs = __shfl_down_sync(kAllLanes, a.neg_infs, lanes_up);
  b.mean = __shfl_down_sync(kAllLanes, a.mean, lanes_up);
  b.m2 = __shfl_down_sync(kAllLanes, a.m2, lanes_up);
  b.min = __shfl_down_sync(kAllLanes, a.min, lanes_up);
  b.max = __shfl_down_sync(kAllLanes, a.max, lanes_up);
  return b;
}

__device__ inline HigherMoments from_lane(const HigherMoments& a, int lanes_up) {
  HigherMoments b;
  b.n = __shfl_down_sync(kAllLanes, a.n, lanes_up);
  b.mean = __shfl_down_sync(kAllLanes, a.mean, lanes_up);
  b.m2 = __shfl_down_sync(kAllLanes, a.m2, lanes_up);
  b.m3 = __shfl_down_sync(kAllLanes, a.m3, lanes_up);
  b.m4 = __shfl_down_sync(kAllLanes, a.m4, lanes_up);
  b.abs_mean = __shfl_down_sync(kAllLanes, a.abs_mean, lanes_up);
  return b;
}

// Merges the states of a warp's threads in order. Lane 0 gets the result.
template <class State>
__device__ inline State warp_merge(State state) {
#pragma unroll 1  // unrolled, it would need too many registers
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const State next = from_lane(state, lanes);
    if (threadIdx.x % (2 * lanes) == 0) state = merge(state, next);
  }
  return state;
}

// Merges the states of all threads in order. Thread 0 gets the result.
template <class State, int kBlock>
__device__ inline State block_merge(State state, Shared<kBlock>& shared) {
  static_assert(sizeof(State) <= sizeof(Moments), "the states of all warps fit");
  state = warp_merge(state);
  auto* warps = reinterpret_cast<State*>(shared.bytes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x > 0) {
      state = static_cast<int>(threadIdx.x) < Shared<kBlock>::kWarps ? warps[threadIdx.x] : State();
    }
    state = warp_merge(state);
  }
  return state;
}

}  // namespace paramstats::cuda
