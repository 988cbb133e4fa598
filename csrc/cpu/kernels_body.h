// The CPU kernels, compiled once per SIMD level. kernels_plain.cpp, kernels_avx2.cpp,
// kernels_avx512.cpp and kernels_neon.cpp each include this file in their own namespace, with the
// target's instructions enabled and the constants of the level defined: kVectorBytes; kUnroll and
// kUnroll16 (for 16-bit dtypes), the vectors that have their own sums; kTileUnroll, how often the
// innermost loop is unrolled. This file has no include guard, no standard headers and no std::
// templates: a template instantiated here may use instructions that the rest of the program must
// not use.
//
// A kernel computes this, within the error bound below (bytes_body.h: integers of 8 bits and bool,
// exactly):
//
//     for x in chunk: zeros += x == 0; min, max = ...; mean = sum(x) / n; m2 = sum((x - mean)^2)
//
// It works on blocks of kBlock elements. For each block it sums d = x - pivot and d^2 in SIMD
// lanes. The pivot is a value close to the block's mean: the mean of an earlier block. Then
//
//     mean = pivot + sum(d) / n           m2 = sum(d^2) - sum(d)^2 / n
//
// needs one read, and the subtraction is small: a block is accepted only if the distance between
// pivot and mean is at most a quarter of a standard deviation, sum(d)^2 / n <= sum(d^2) / 16.
// Otherwise the block, which is in cache, is read again around its own mean. Minimum, maximum and
// zeros stay in lanes from block to block (for narrow dtypes as the integers in memory) and are
// reduced at the end of the chunk.
//
// Error of an accepted float32 block, u = 2^-24: a sum takes at most kInner - 1 = 7 additions in a
// float32 lane and 2 across lanes before it is widened to float64, where rounding errors are
// negligible. With pivot 0, where d has no rounding, there are 2 more across tiles. Including the
// rounding of d, the error of sum(d) is below 11u sum|d| and the error of sum(d^2) is below
// 13u sum(d^2). Because |sum d| <= sqrt(n sum(d^2)) / 4, the error of m2 is at most
// (13 + 2 * 11 / 4) u sum(d^2) <= 18.5u (16/15) m2 = 1.2e-6 m2, and that of the mean is at
// most 11.4u std = 6.8e-7 std, if all roundings have the same sign. After merging, the error of std
// and norm is at most 7.5e-7. docs/accuracy.md has the derivation, also for float64 lanes (float64
// and integers of 32 bits and more).

constexpr int kPrefetchBytes = 8192;  // distance of the prefetch from the current read

// clang-format off: each part uses the ones before it.
#include "lanes_body.h"
#include "extremes_body.h"
#include "dtypes_body.h"
#include "block_sums_body.h"
#include "bytes_body.h"
// clang-format on

// ---- convert sums to a state ---------------------------------------------------------------

// The state of a chunk while its blocks are processed.
template <class T>
struct Running {
  Moments state;  // without minimum, maximum and zeros of the elements that are in `extremes`
  Extremes<T> extremes;
  typename T::Scalar pivot = 0;
  bool has_extremes = false;     // whether any element is in `extremes`
  bool expects_nonzero = false;  // whether to use NonzeroExtremes
};

template <class T>
inline bool all_same(const typename T::Storage* x, int64_t n, int64_t zeros) {
  return zeros == n || __builtin_memcmp(x, x + 1, (n - 1) * sizeof(x[0])) == 0;
}

// Sums a block and adds its extremes to `extremes`. A block that has a zero, though none was
// expected, is in cache and is read again for its extremes.
template <class T>
inline BlockSums sums_and_extremes(const typename T::Storage* x, int64_t n, Running<T>& r,
                                   Extremes<T>& extremes) {
  if constexpr (T::kHasNonzero) {
    if (r.expects_nonzero) {
      NonzeroExtremes<T> nonzero;
      const BlockSums s = block_sums<T>(x, n, r.pivot, nonzero);
      r.expects_nonzero = !nonzero.has_zero();
      if (r.expects_nonzero) {
        nonzero.add_to(extremes.sets[0]);
      } else {
        add_extremes<T>(x, n, extremes);
      }
      return s;
    }
  }
  return block_sums<T>(x, n, r.pivot, extremes);
}

// Summarizes one block around the pivot, and again around the block's own mean if the pivot was too
// far from it. Returns false if the lanes cannot represent the block: it contains NaN or infinity,
// or d^2 overflows or underflows.
template <class T>
inline bool try_block(const typename T::Storage* x, int64_t n, Running<T>& r) {
  constexpr int kTries = 3;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    Extremes<T> extremes = r.extremes;
    const BlockSums s = sums_and_extremes(x, n, r, extremes);
    Moments out;
    Fit fit = Fit::kUnusable;
    if (s.sum_sq == 0 &&  // a constant: mean and m2 have no rounding
        all_same<T>(x, n, extremes.zero_count() - r.extremes.zero_count())) {
      typename T::Storage first[kUnit<T>] = {element_at(x)};
      typename T::Vector v[T::kVectors];
      T::load(first, v);
      fit = Fit::kGood;
      out.count = n;
      out.mean = v[0][0];
    } else {
      fit = from_sums({s.sum, s.sum_sq, -kInfinity, kInfinity, 0}, n, r.pivot, kMaxShiftShare,
                      T::kMinSquares, kLargest, out);
      out.min = kInfinity;
      out.max = -kInfinity;
    }
    if (fit == Fit::kUnusable) return false;
    if (fit == Fit::kGood) {
      r.state = merge(r.state, out);
      r.extremes = extremes;
      r.has_extremes = true;
      return true;
    }
    r.pivot = static_cast<typename T::Scalar>(r.pivot + s.sum / static_cast<double>(n));
  }
  return false;
}

template <class T>
inline Moments finish(const Running<T>& r) {
  Moments state = r.state;
  if (!r.has_extremes) return state;
  state.zeros += r.extremes.zero_count();
  typename T::Extremes all = r.extremes.sets[0];
  for (int s = 1; s < Extremes<T>::kSets; ++s) all.join(r.extremes.sets[s]);
  const double min = all.minimum(), max = all.maximum();
  state.min = min < state.min ? min : state.min;
  state.max = max > state.max ? max : state.max;
  return state;
}

// Summarizes n <= kPart elements that the lanes of their dtype cannot represent. Tries float64
// lanes on a converted copy first, then the slower exact routine, which handles NaN and infinity.
template <class T>
void summarize_difficult_part(const typename T::Storage* x, int64_t n, Running<T>& r) {
  double* const values = scratch();
  convert<T>(x, n, values);
  if constexpr (sizeof(typename T::Scalar) == 4) {
    Running<Native<double, InDouble>> wide;
    wide.pivot = values[0];
    if (try_block<Native<double, InDouble>>(values, n, wide)) {
      r.state = merge(r.state, finish(wide));
      return;
    }
  }
  Moments out;
  update(out, values, n);
  r.state = merge(r.state, out);
  // The pivot must be finite: otherwise every later block would take this slow path.
  r.pivot = static_cast<typename T::Scalar>(out.mean);
}

// Retries a block whose lanes failed, part by part; usually only one part needs the slow path.
template <class T>
__attribute__((noinline)) void summarize_difficult_block(const typename T::Storage* x, int64_t n,
                                                         Running<T>& r) {
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t size = n - i < kPart ? n - i : kPart;
    if (n > kPart && try_block<T>(x + i, size, r)) continue;
    summarize_difficult_part<T>(x + i, size, r);
  }
}

template <class T>
Moments chunk(const void* data, int64_t n) {
  constexpr bool kNarrowCounters = sizeof(typename T::Storage) == 1;
  constexpr int64_t kFirst = kNarrowCounters ? kPart / 2 : kPart;
  constexpr int64_t kNext = kNarrowCounters ? kPart / 2 : kBlock;
  const auto* x = static_cast<const typename T::Storage*>(data);
  Running<T> running;
  int64_t size = kFirst;  // the first block is short: it only has to find a pivot
  for (int64_t i = 0; i < n; i += size, size = kNext) {
    if (size > n - i) size = n - i;
    if (!try_block<T>(x + i, size, running)) {
      summarize_difficult_block<T>(x + i, size, running);
    }
    if constexpr (T::kHasNonzero) {
      const auto& e = running.extremes;
      if (i == 0 && size < n) {
        running.expects_nonzero = e.sets[0].has_both_signs() && e.zero_count() == 0;
      }
    }
  }
  return finish(running);
}

// clang-format off: each uses the ones before it.
#include "rows_extremes_body.h"
#include "rows_body.h"
#include "updates_body.h"
#include "distribution_body.h"
#include "distribution_keys_body.h"
#include "distribution_counts_body.h"
#include "distribution_fast_body.h"
// clang-format on

using Int16 = Integer16<int16_t, Int16Lanes, UInt16Lanes, Int32Lanes>;
using UInt16 = Integer16<uint16_t, UInt16Lanes, UInt16Lanes, UInt32Lanes>;
using Int32 = Integer32<int32_t, Int32Lanes>;
using UInt32 = Integer32<uint32_t, UInt32Lanes>;

const Kernels kKernels = {PARAMSTATS_LEVEL_NAME,
                          {
                              chunk<Native<double, InDouble>>,
                              chunk<Native<float, InFloat>>,
                              chunk<BFloat16>,
                              chunk<Float16>,
                              chunk<Float8E4M3FN>,
                              chunk<Float8E5M2>,
                              chunk_of_bytes<int8_t>,
                              chunk_of_bytes<uint8_t>,
                              chunk_of_bytes<bool>,
                              chunk<Int16>,
                              chunk<UInt16>,
                              chunk<Int32>,
                              chunk<UInt32>,
                              chunk<Native<int64_t, InDouble>>,
                              chunk<Native<uint64_t, InDouble>>,
                          },
                          chunk_of_update,
                          {
                              distribution<Native<double, InDouble>>,
                              distribution<Native<float, InFloat>>,
                              distribution<BFloat16>,
                              distribution<Float16>,
                              distribution<Float8E4M3FN>,
                              distribution<Float8E5M2>,
                              distribution<Whole<int8_t>, chunk_of_bytes<int8_t>>,
                              distribution<Whole<uint8_t>, chunk_of_bytes<uint8_t>>,
                              distribution<Whole<bool>, chunk_of_bytes<bool>>,
                              distribution<Whole<int16_t>, chunk<Int16>>,
                              distribution<Whole<uint16_t>, chunk<UInt16>>,
                              distribution<Whole<int32_t>, chunk<Int32>>,
                              distribution<Whole<uint32_t>, chunk<UInt32>>,
                              distribution<Whole<int64_t>, chunk<Native<int64_t, InDouble>>>,
                              distribution<Whole<uint64_t>, chunk<Native<uint64_t, InDouble>>>,
                          },
                          {
                              rows<Native<double, InDouble>>,
                              rows<Native<float, InFloat>>,
                              rows<BFloat16>,
                              rows<Float16>,
                              rows<Float8E4M3FN>,
                              rows<Float8E5M2>,
                              rows_of_bytes<int8_t>,
                              rows_of_bytes<uint8_t>,
                              rows_of_bytes<bool>,
                              rows<Int16>,
                              rows<UInt16>,
                              rows<Int32>,
                              rows<UInt32>,
                              rows<Native<int64_t, InDouble>>,
                              rows<Native<uint64_t, InDouble>>,
                          }};
