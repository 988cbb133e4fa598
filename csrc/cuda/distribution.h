// Reads the distribution of a span of chunks with the threads of a block. A part of kernels.h.
//
// It reads the tensor a second time, after the chunks were summarized, from the second-level cache
// or from memory. The counts are integers, so that atomic additions in any order give the same
// result. The powers of deviations are summed in float64 around the mean of the chunk, which is
// known, so that the exact mean is within 1e-6 standard deviations of it and nothing cancels; with
// u = 2^-53, the relative error of the sums of even powers is below (n / kThreads + 15) u, and that
// of the third powers is as small compared with the sum of |d|^3 <= sqrt(m2 m4). They are merged in
// the order of the chunks. (Blocks of adjacent elements begin at multiples of 32 from the first
// element of a tensor, whatever its address, so that a warp loads one element per thread.)
#pragma once

#include "access.h"
#include "chunk.h"
#include "table.h"

namespace paramstats::cuda {

// |x| = 2^exponent (1 + fraction / 2^32), where the lowest bit of the fraction also stands for all
// bits below it.
struct Magnitude {
  int exponent;
  uint32_t fraction;
};
constexpr int kNoExponent = -0x8000;  // of what is not counted: zeros, NaN, infinities

// Of an integer that is not 0.
__device__ inline Magnitude magnitude_of(uint64_t x) {
  const int zeros = __clzll(static_cast<int64_t>(x));
  const uint64_t fraction = zeros < 63 ? x << (zeros + 1) : 0;
  return {63 - zeros,
          static_cast<uint32_t>(fraction >> 32) | (static_cast<uint32_t>(fraction) != 0 ? 1u : 0u)};
}

// Of an element that is finite and not 0, and whose value is x. (The value of an integer of 64 bits
// may be rounded.)
__device__ inline Magnitude magnitude_of(DType dtype, const void* data, int i, double x) {
  if (dtype >= DType::kInt64) {
    const uint64_t bits = __ldg(static_cast<const unsigned long long*>(data) + i);
    return magnitude_of(dtype == DType::kInt64 && x < 0 ? 0 - bits : bits);
  }
  const uint64_t bits = bits_of(x) & 0x7fffffffffffffff;
  if (bits >> 52 == 0) {  // subnormal in float64
    Magnitude out = magnitude_of(bits);
    out.exponent -= 1074;
    return out;
  }
  return {static_cast<int>(bits >> 52) - 1023,
          static_cast<uint32_t>(bits >> 20) | ((bits & 0xfffff) != 0 ? 1u : 0u)};
}

// Counts for the block of the 32 elements of a warp, where `largest` is their largest exponent: for
// each format, the elements that become 0, and those that are rounded above its largest number.
// Relative to the scale, the limits are powers of two, and 1.75, 1.8125 and 1.875 times the one of
// the largest element (kMxFlushed, kMxSaturated).
__device__ inline void count_mx(const Magnitude& x, int largest, int (&counts)[kMxWords]) {
  const int below = 2 * (largest - x.exponent) + (x.fraction == 0 ? 1 : 0);
  counts[0] += below > 2 * 4;
  counts[2] += below > 2 * 18;
  counts[4] += below > 2 * 32;
  if (x.exponent != largest) return;
  counts[1] += x.fraction >= 0xc0000000u;
  counts[3] += x.fraction > 0xd0000000u;
  counts[5] += x.fraction >= 0xe0000000u;
}

// The sums of a thread: powers of d = x - pivot, |x|, and the number of finite elements.
constexpr int kPowers = 6;

// Reads one chunk. All threads of the block get the sums and the counts.
__device__ inline void read_chunk(const Chunk& chunk, double pivot, unsigned* bins, int n_bins,
                                  int first_exponent, Shared<kThreads>& shared,
                                  double (&s)[kPowers], double (&mx)[kMxWords]) {
  constexpr int kUnroll = 2;
  int counts[kMxWords] = {};
#pragma unroll 1
  for (int begin = 0; begin < chunk.n; begin += kThreads * kUnroll) {
    double x[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = begin + k * kThreads + static_cast<int>(threadIdx.x);
      x[k] = i < chunk.n ? element_of(chunk.dtype, chunk.data, i) : kInfinity;
    }
#pragma unroll 1
    for (int k = 0; k < kUnroll; ++k) {
      const int i = begin + k * kThreads + static_cast<int>(threadIdx.x);
      const double value = k == 0 ? x[0] : x[1];
      Magnitude magnitude = {kNoExponent, 0};
      if (is_finite(value)) {
        const double d = value - pivot, d2 = times(d, d), size = value < 0 ? -value : value;
        s[0] += d;
        s[1] += d2;
        s[2] = fused(d2, d, s[2]);
        s[3] = fused(d2, d2, s[3]);
        s[4] += size;
        s[5] += 1;
        if (value != 0) {
          magnitude = magnitude_of(chunk.dtype, chunk.data, i, value);
          atomicAdd(&bins[magnitude.exponent - first_exponent + (value < 0 ? 0 : n_bins)], 1u);
        }
      }
      int largest = magnitude.exponent;
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        const int other = __shfl_xor_sync(kAllLanes, largest, lanes);
        largest = other > largest ? other : largest;
      }
      if (magnitude.exponent != kNoExponent) count_mx(magnitude, largest, counts);
    }
  }
  block_add(s, shared);
#pragma unroll
  for (int k = 0; k < kMxWords; ++k) mx[k] = counts[k];
  block_add(mx, shared);
}

// The mean of |x| / 2^20 times 2^20, where the sum of |x| overflows.
__device__ inline double scaled_abs_mean(const Chunk& chunk, double n, Shared<kThreads>& shared) {
  double sum[1] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < chunk.n; i += kThreads) {
    const double x = element_of(chunk.dtype, chunk.data, i);
    if (is_finite(x)) sum[0] += times(x < 0 ? -x : x, 0x1p-20);
  }
  block_add(sum, shared);
  return times(sum[0] / n, 0x1p20);
}

}  // namespace paramstats::cuda
