// Summarizes one chunk with the threads of a block. A part of kernels.h.
//
// A block reads its chunk once, with E::kLoads loads of 16 bytes in flight per thread, and sums
// d = x - pivot and d^2. The pivot is the mean of 64 elements spread over the chunk. from_sums
// accepts it if sum(d)^2 / n <= sum(d^2) / 8. For 64 elements of one distribution this fails three
// times in a thousand; the chunk is then read again around its own mean. Integers of one byte are
// summed exactly, and need no pivot.
//
// Error of an accepted chunk in float32 lanes, u = 2^-24. Loads are added up in tiles of E::kTile.
// The sums of a tile take at most 7 additions in a lane and 3 across lanes before they are widened
// to float64, where rounding errors are negligible. (float64 is used once per 16 elements or more,
// so that GPUs with slow float64 are still limited by memory.) Including the rounding of d, the
// error of sum(d) is below 11u sum|d|. The error of S := sum(d^2), whose products are fused with
// the additions but for the first of a lane, and may underflow, is below 14u S. Because |sum d| <=
// sqrt(n S / 8) and S <= (8/7) m2, the error of m2 is at most (14 + 11 / sqrt(2)) u S <= 24.9u m2,
// and that of the mean is at most 11u rms(d) <= 11.8u std = 7.1e-7 std. After merging, the error of
// std and norm is at most 8.9e-7, if all roundings have the same sign: docs/accuracy.md. float64
// and integers of 32 bits and more have float64 lanes.
#pragma once

#include "sums.h"
#include "table.h"

namespace paramstats::cuda {

constexpr int kBlocksPerSM = 6;  // limits registers to 80 per thread

struct Chunk {
  DType dtype;
  const void* data;
  int n;  // at most kMostElements
};
static_assert(kMostElements / kThreads <= 1 << 11 && kMostElements / kThreads + 1 < 1 << 16,
              "a thread counts zeros in float16, and squares below 2^16 in 32 bits");

// The 16-byte loads of a thread: every kThreads-th vector of the chunk. Before the first vector and
// after the last one are less than 16 bytes each. Indices in a chunk fit in 32 bits.
template <class E>
struct Loads {
  const uint4* next;
  int left;  // vectors of the chunk from `next` on
  Words v[E::kLoads] = {};

  // Loads the next vectors, as far as there are any.
  __device__ void load() {
    recompute(next);
#pragma unroll
    for (int k = 0; k < E::kLoads; ++k) {
      if (k * kThreads < left) {
        const uint4 load = __ldg(next + k * kThreads);
        v[k] = {{load.x, load.y, load.z, load.w}};
      }
    }
  }

  __device__ bool full() const { return (E::kLoads - 1) * kThreads < left; }

  // Adds all vectors to the sums of a thread, and loads the next ones.
  template <class State>
  __device__ void take(State& s, typename E::Lane pivot) {
#pragma unroll
    for (int begin = 0; begin < E::kLoads; begin += E::kTile) {
      Words tile[E::kTile];
#pragma unroll
      for (int k = 0; k < E::kTile; ++k) tile[k] = v[begin + k];
      s.take(tile, pivot);
    }
    next += E::kLoads * kThreads;
    left -= E::kLoads * kThreads;
    load();
  }

  // Adds the first vector only.
  template <class State>
  __device__ void take_one(State& s, typename E::Lane pivot) {
    const Words one[1] = {v[0]};
    s.take(one, pivot);
    left -= kThreads;
#pragma unroll
    for (int k = 1; k < E::kLoads; ++k) v[k - 1] = v[k];
  }
};

// The mean of 64 elements, one of each 64th of the chunk; the same in every warp of a block. Their
// positions are multiples of the golden ratio modulo 1: equal distances could match the row length
// of a matrix.
template <class E>
__device__ inline typename E::Lane sample_mean(const typename E::Storage* x, int n, int thread) {
  typename E::Lane sum = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t k = 2 * (thread % 32u) + half;
    const uint32_t position = (k << 26) + ((k + 1) * 0x9e3779b9u >> 6);  // in units of n / 2^32
    sum += element<E>(x, static_cast<int>(uint64_t{position} * static_cast<uint32_t>(n) >> 32));
  }
#pragma unroll 1
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return times(sum, typename E::Lane(1.0 / 64));
}

// What a state has besides its counts. It has no default values: they would need registers while a
// chunk is read.
struct Summary {
  int64_t zeros;
  double mean, m2, min, max;
};

// Of n elements whose sums are exact integers of less than 2^53.
__device__ inline Summary exact_summary(const ShiftedSums& s, int n) {
  const auto sum = static_cast<int64_t>(s.sum), sum_sq = static_cast<int64_t>(s.sum_sq);
  return {s.zeros, s.sum / n, static_cast<double>(n * sum_sq - sum * sum) / n, s.min, s.max};
}

// Returns false if the lanes cannot represent the chunk: NaN, infinity, overflow or underflow.
template <class E>
__device__ inline bool try_chunk(const void* data, int n, Shared<kThreads>& shared, Summary& out) {
  constexpr int kTries = 3;
  constexpr double kMaxShiftShare = 1.0 / 8;
  using Storage = typename E::Storage;
  const auto* x = static_cast<const Storage*>(data);
  typename E::Lane pivot = 0;
#pragma unroll 1
  for (int attempt = 0;;) {
    int thread = threadIdx.x;
    recompute(x);
    recompute(n);
    recompute(thread);
    const int misaligned = static_cast<int>(reinterpret_cast<uint64_t>(x) % 16);
    const int to_aligned = (16 - misaligned) % 16 / static_cast<int>(sizeof(Storage));
    const int head = to_aligned < n ? to_aligned : n;
    const int vectors = (n - head) / kPerVector<E>;
    const int body = vectors * kPerVector<E>;

    // The sample is loaded after the first vectors, so that the latencies overlap.
    Loads<E> loads = {reinterpret_cast<const uint4*>(x + head) + thread, vectors - thread};
    loads.load();
    typename E::template State<E> sums(load_one<E>(x, 0));
    if (!E::kExact && attempt == 0) pivot = sample_mean<E>(x, n, thread);

#pragma unroll 1
    while (loads.full()) loads.take(sums, pivot);
#pragma unroll 1
    while (loads.left > 0) loads.take_one(sums, pivot);
    if (thread < n - body) {  // an element before or after the vectors
      sums.take_one(load_one<E>(x, thread < head ? thread : thread + body), pivot);
    }

    const ShiftedSums s = block_sums(sums.sums(), shared);
    if constexpr (E::kExact) {
      out = exact_summary(s, n);
      return true;
    } else {
      Moments state;
      const Fit fit = from_sums(s, n, pivot, kMaxShiftShare, E::kMinSquares, kLargest, state);
      if (fit == Fit::kGood) {
        out = {state.zeros, state.mean, state.m2, state.min, state.max};
        return true;
      }
      if (fit == Fit::kUnusable || ++attempt == kTries) return false;
      pivot = static_cast<typename E::Lane>(pivot + s.sum / n);
    }
  }
}

__device__ inline double element_of(DType dtype, const void* data, int64_t i) {
  const auto* x8 = static_cast<const uint8_t*>(data);
  const auto* x16 = static_cast<const uint16_t*>(data);
  const auto* x32 = static_cast<const uint32_t*>(data);
  const auto* x64 = static_cast<const unsigned long long*>(data);
  switch (dtype) {
    case DType::kFloat64: return element<Float64>(x64, i);
    case DType::kFloat32: return element<Float32>(x32, i);
    case DType::kBFloat16: return element<BFloat16>(x16, i);
    case DType::kFloat16: return element<Float16>(x16, i);
    case DType::kFloat8E4M3FN: return element<Float8E4M3FN>(x8, i);
    case DType::kFloat8E5M2: return element<Float8E5M2>(x8, i);
    case DType::kInt8: return element<Int8>(x8, i);
    case DType::kUInt8: return element<UInt8>(x8, i);
    case DType::kBool: return element<Bool>(x8, i);
    case DType::kInt16: return element<Int16>(x16, i);
    case DType::kUInt16: return element<UInt16>(x16, i);
    case DType::kInt32: return element<Int32>(x32, i);
    case DType::kUInt32: return element<UInt32>(x32, i);
    case DType::kInt64: return element<Int64>(x64, i);
    case DType::kUInt64: return element<UInt64>(x64, i);
  }
  return 0;
}

__device__ inline bool try_chunk_of(const Chunk& chunk, Shared<kThreads>& shared, Summary& out) {
  switch (chunk.dtype) {
    case DType::kFloat64: return try_chunk<Float64>(chunk.data, chunk.n, shared, out);
    case DType::kFloat32: return try_chunk<Float32>(chunk.data, chunk.n, shared, out);
    case DType::kBFloat16: return try_chunk<BFloat16>(chunk.data, chunk.n, shared, out);
    case DType::kFloat16: return try_chunk<Float16>(chunk.data, chunk.n, shared, out);
    case DType::kFloat8E4M3FN: return try_chunk<Float8E4M3FN>(chunk.data, chunk.n, shared, out);
    case DType::kFloat8E5M2: return try_chunk<Float8E5M2>(chunk.data, chunk.n, shared, out);
    case DType::kInt8: return try_chunk<Int8>(chunk.data, chunk.n, shared, out);
    case DType::kUInt8: return try_chunk<UInt8>(chunk.data, chunk.n, shared, out);
    case DType::kBool: return try_chunk<Bool>(chunk.data, chunk.n, shared, out);
    case DType::kInt16: return try_chunk<Int16>(chunk.data, chunk.n, shared, out);
    case DType::kUInt16: return try_chunk<UInt16>(chunk.data, chunk.n, shared, out);
    case DType::kInt32: return try_chunk<Int32>(chunk.data, chunk.n, shared, out);
    case DType::kUInt32: return try_chunk<UInt32>(chunk.data, chunk.n, shared, out);
    case DType::kInt64: return try_chunk<Int64>(chunk.data, chunk.n, shared, out);
    case DType::kUInt64: return try_chunk<UInt64>(chunk.data, chunk.n, shared, out);
  }
  return false;
}

__device__ inline bool try_chunk_of(const Chunk& chunk, Shared<kThreads>& shared, Moments& out) {
  Summary summary;
  if (!try_chunk_of(chunk, shared, summary)) return false;
  out.count = chunk.n;
  out.zeros = summary.zeros;
  out.mean = summary.mean;
  out.m2 = summary.m2;
  out.min = summary.min;
  out.max = summary.max;
  return true;
}

}  // namespace paramstats::cuda
