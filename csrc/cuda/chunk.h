// Summarizes one chunk with the threads of a block. A part of kernels.h.
//
// A block reads its chunk once, with E::kTile loads of 16 bytes in flight per thread, and sums
// d = x - pivot and d^2. The pivot is the mean of 64 elements spread over the chunk. from_sums
// accepts it if sum(d)^2 / n <= sum(d^2) / 8. For 64 elements of one distribution this fails three
// times in a thousand; the chunk is then read again around its own mean.
//
// Error of an accepted chunk in float32 lanes, u = 2^-24. The sums of a tile take at most 7
// additions in a lane and 3 across lanes before they are widened to float64, where rounding errors
// are negligible. (float64 is used once per 16 elements or more, so that GPUs with slow float64 are
// still limited by memory.) Including the rounding of d, the error of sum(d) is below 11u sum|d|.
// The error of S := sum(d^2), whose products are fused with the additions and may underflow, is
// below 14u S. Because |sum d| <= sqrt(n S / 8) and S <= (8/7) m2, the error of m2 is at most (14 +
// 11 / sqrt(2)) u S <= 24.9u m2, and that of the mean is at most 11u rms(d) <= 11.8u std = 7.1e-7
// std. After merging, the error of std and norm is at most 8.9e-7, if all roundings have the same
// sign: docs/accuracy.md. float64 and integers of 32 bits and more have float64 lanes.
#pragma once

#include "block.h"
#include "elements.h"
#include "table.h"

namespace paramstats::cuda {

constexpr int kBlocksPerSM = 6;  // limits registers to 80 per thread

struct Chunk {
  DType dtype;
  const void* data;
  int n;
};

template <class L>
__device__ inline void take(typename L::Lane x, typename L::Lane pivot, typename L::Lane& sum,
                            typename L::Lane& sum_sq, Sums<L>& s) {
  const typename L::Lane d = x - pivot;
  sum += d;
  sum_sq += d * d;  // fused
  s.min = smaller(s.min, x);
  s.max = larger(s.max, x);
  s.zeros += x == 0 ? typename L::Count{1} : typename L::Count{0};
}

// Adds the elements of kVectors loads.
template <class E, int kVectors>
__device__ inline void take_vectors(const Words (&v)[kVectors], typename E::Lane pivot,
                                    Sums<typename E::Lanes>& s) {
  using Lane = typename E::Lane;
  constexpr int kLanes = kPerVector<E> == 16 ? 8 : kPerVector<E> == 2 ? 2 : 4;
  Lane sum[kLanes] = {}, sum_sq[kLanes] = {};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    Lane x[kPerVector<E>];
    E::unpack(v[k], x);
#pragma unroll
    for (int i = 0; i < kPerVector<E>; ++i) {
      take(x[i], pivot, sum[i % kLanes], sum_sq[i % kLanes], s);
    }
  }
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma unroll
    for (int l = 0; l < half; ++l) {
      sum[l] += sum[l + half];
      sum_sq[l] += sum_sq[l + half];
    }
  }
  s.sum += sum[0];
  s.sum_sq += sum_sq[0];
}

// Sums this thread's elements of a chunk around a pivot. Indices in a chunk fit in 32 bits.
template <class E>
__device__ inline Sums<typename E::Lanes> thread_sums(const typename E::Storage* x, int n,
                                                      typename E::Lane pivot) {
  constexpr int kTile = E::kTile;
  const int misaligned = static_cast<int>(reinterpret_cast<uint64_t>(x) % 16);
  int head = (16 - misaligned) % 16 / static_cast<int>(sizeof(typename E::Storage));
  if (head > n) head = n;
  const int vectors = (n - head) / kPerVector<E>;
  const int body = vectors * kPerVector<E>;
  const auto* v = reinterpret_cast<const uint4*>(x + head);

  Sums<typename E::Lanes> s;
  s.min = s.max = element<E>(x, 0);
  int i = threadIdx.x;
#pragma unroll 1
  for (; i + (kTile - 1) * kThreads < vectors; i += kTile * kThreads) {
    Words tile[kTile];
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const uint4 load = __ldg(v + i + k * kThreads);
      tile[k] = {{load.x, load.y, load.z, load.w}};
    }
    take_vectors<E, kTile>(tile, pivot, s);
  }
#pragma unroll 1
  for (; i < vectors; i += kThreads) {
    const uint4 load = __ldg(v + i);
    const Words one[1] = {{{load.x, load.y, load.z, load.w}}};
    take_vectors<E, 1>(one, pivot, s);
  }
  // Elements before the first vector and after the last one: one per thread.
  const int edge = threadIdx.x;
  if (edge < n - body) {
    typename E::Lane sum = 0, sum_sq = 0;
    take(element<E>(x, edge < head ? edge : edge + body), pivot, sum, sum_sq, s);
    s.sum += sum;
    s.sum_sq += sum_sq;
  }
  return s;
}

// The mean of 64 elements spread over the chunk; the same in every warp of a block. The distances
// between them vary: equal ones could match the row length of a matrix.
template <class E>
__device__ inline typename E::Lane sample_mean(const typename E::Storage* x, int n) {
  constexpr int kSamples = 64;
  const int stride = n / kSamples;
  typename E::Lane sum = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int k = 2 * (threadIdx.x % 32) + half;
    sum += element<E>(x, stride > 0 ? k * stride + (k * 37 + 11) % stride : k % n);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum / kSamples;
}

// Returns false if the lanes cannot represent the chunk: NaN, infinity, overflow or underflow.
template <class E>
__device__ inline bool try_chunk(const void* data, int n, Shared<kThreads>& shared, Moments& out) {
  constexpr int kTries = 3;
  constexpr double kMaxShiftShare = 1.0 / 8;
  const auto* x = static_cast<const typename E::Storage*>(data);
  auto pivot = sample_mean<E>(x, n);
#pragma unroll 1
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const ShiftedSums s = block_sums(thread_sums<E>(x, n, pivot), shared);
    const Fit fit = from_sums(s, n, pivot, kMaxShiftShare, E::kMinSquares, kLargest, out);
    if (fit != Fit::kFar) return fit == Fit::kGood;
    pivot = static_cast<typename E::Lane>(pivot + s.sum / n);
  }
  return false;
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

__device__ inline bool try_chunk_of(const Chunk& chunk, Shared<kThreads>& shared, Moments& out) {
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

}  // namespace paramstats::cuda
