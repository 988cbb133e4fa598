// The CPU kernels, compiled once per SIMD level. kernels_plain.cpp, kernels_avx2.cpp,
// kernels_avx512.cpp and kernels_neon.cpp each include this file in their own namespace, with the
// target's instructions enabled and the constants of the level defined: kVectorBytes; kUnroll, the
// vectors that have their own sums; kTileUnroll, how often the innermost loop is unrolled. This
// file has no include guard, no standard headers and no std:: templates: a template instantiated
// here may use instructions that the rest of the program must not use.
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
// Error of an accepted float32 block, u = 2^-24: a sum takes at most kInner = 8 additions in a
// float32 lane and 2 more across lanes before it is widened to float64, where rounding errors are
// negligible. Including the rounding of d, the error of sum(d) is below 11u sum|d| and the error of
// sum(d^2) is below 13u sum(d^2). Because |sum d| <= sqrt(n sum(d^2)) / 4, the error of m2 is at
// most (13 + 2 * 11 / 4) u sum(d^2) <= 18.5u (16/15) m2 = 1.2e-6 m2, and that of the mean is at
// most 11.4u std = 6.8e-7 std, if all roundings have the same sign. After merging, the error of std
// and norm is at most 7.5e-7. docs/accuracy.md has the derivation, also for float64 lanes (float64
// and integers of 32 bits and more).

constexpr int kPrefetchBytes = 16384;  // distance of the prefetch from the current read

#include "lanes_body.h"
// (Uses the lanes.)
#include "bytes_body.h"

// Reads an element at any address, aligned or not.
template <class S>
inline S element_at(const S* x) {
  S value;
  __builtin_memcpy(&value, x, sizeof(value));
  return value;
}

// ---- sums of one block ---------------------------------------------------------------------

struct BlockSums {
  double sum;     // of d = x - pivot
  double sum_sq;  // of d^2; not finite if any element is not
};

// Vectors are processed in groups of kGroup. A group has kUnits units, and a unit has the vectors
// of one load. Each vector of a group has its own sums, so that additions do not wait for each
// other.
template <class T>
constexpr int kUnits = kUnroll > T::kVectors ? kUnroll / T::kVectors : 1;
template <class T>
constexpr int kGroup = kUnits<T> * T::kVectors;
template <class T>
constexpr int kUnit = T::kVectors * T::kWidth;  // elements

// Minimum, maximum and zeros of the elements so far, one set per unit.
template <class T>
struct Extremes {
  typename T::Extremes units[kUnits<T>];
  int64_t zeros = 0;  // in addition to those in lanes

  int64_t zero_count() const {
    auto lanes = units[0].zeros;
    for (int u = 1; u < kUnits<T>; ++u) lanes += units[u].zeros;
    return zeros + lanes_sum(lanes);
  }
  void empty_lanes() {  // must be called before narrow lanes overflow
    zeros = zero_count();
    for (auto& unit : units) unit.zeros -= unit.zeros;
  }
};

// Sums `groups` groups of vectors and adds the sums to float64 lanes. The first pivot is 0, which
// is good enough for most tensors; kPivot = false then saves the subtraction.
template <class T, bool kPivot>
inline __attribute__((always_inline)) void take_tile(const typename T::Storage* x, int groups,
                                                     typename T::Vector pivot, Extremes<T>& e,
                                                     DoubleLanes& sum, DoubleLanes& sum_sq) {
  using V = typename T::Vector;
  constexpr int kStep = kUnits<T> * kUnit<T>;
  V sums[kGroup<T>] = {}, squares[kGroup<T>] = {};
#pragma GCC unroll kTileUnroll
  for (int g = 0; g < groups; ++g, x += kStep) {
#pragma GCC unroll 8
    for (int b = 0; b < static_cast<int>(kStep * sizeof(typename T::Storage)); b += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x) + kPrefetchBytes + b);
    }
#pragma GCC unroll 8
    for (int u = 0; u < kUnits<T>; ++u) {
      V v[T::kVectors];
      T::load(x + u * kUnit<T>, v);
      e.units[u].take(x + u * kUnit<T>, v);
#pragma GCC unroll 8
      for (int k = 0; k < T::kVectors; ++k) {
        const V d = kPivot ? v[k] - pivot : v[k];
        sums[u * T::kVectors + k] += d;
        squares[u * T::kVectors + k] += d * d;
      }
    }
  }
  V all = sums[0], all_squares = squares[0];
  if constexpr (kGroup<T> == 4) {
    all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    all_squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  } else if constexpr (kGroup<T> == 2) {
    all = sums[0] + sums[1];
    all_squares = squares[0] + squares[1];
  }
  static_assert(kGroup<T> == 1 || kGroup<T> == 2 || kGroup<T> == 4, "");
  sum += widened(all);
  sum_sq += widened(all_squares);
}

// Adds the n < kUnit elements at x without reading beyond them. The rest of the unit is filled with
// the first element, which does not change the extremes, and is excluded from the sums.
template <class T>
inline void take_remainder(const typename T::Storage* x, int64_t n, typename T::Vector pivot,
                           Extremes<T>& e, BlockSums& out) {
  using V = typename T::Vector;
  typename T::Storage padded[kUnit<T>];
  const auto first = element_at(x);
  for (int i = 0; i < kUnit<T>; ++i) padded[i] = first;
  __builtin_memcpy(padded, x, n * sizeof(x[0]));
  V v[T::kVectors];
  T::load(padded, v);
  e.units[0].take(padded, v);
  if (v[0][0] == 0) e.zeros -= kUnit<T> - n;
  for (int k = 0; k < T::kVectors; ++k) {
    const V d = v[k] - pivot;
    for (int l = 0; l < T::kWidth; ++l) {
      if (T::element(k, l) >= n) continue;
      out.sum += d[l];
      out.sum_sq += static_cast<double>(d[l]) * d[l];
    }
  }
}

template <class T>
inline BlockSums block_sums(const typename T::Storage* x, int64_t n, typename T::Scalar pivot,
                            Extremes<T>& extremes) {
  constexpr int kStep = kUnits<T> * kUnit<T>, kTile = T::kInner * kStep;
  Extremes<T> e = extremes;
  BlockSums out = {0, 0};
  const typename T::Vector pivots = typename T::Vector{} + pivot;
  DoubleLanes sum = {}, sum_sq = {};
  int64_t i = 0;
  if (pivot == 0) {
    for (; i + kTile <= n; i += kTile) {
      take_tile<T, false>(x + i, T::kInner, pivots, e, sum, sum_sq);
    }
  }
  for (; i + kTile <= n; i += kTile) {
    take_tile<T, true>(x + i, T::kInner, pivots, e, sum, sum_sq);
  }
  if (i + kStep <= n) {
    const int groups = static_cast<int>((n - i) / kStep);
    take_tile<T, true>(x + i, groups, pivots, e, sum, sum_sq);
    i += groups * kStep;
  }
  for (; i < n; i += kUnit<T>) {
    if (n - i < kUnit<T>) {
      take_remainder<T>(x + i, n - i, pivots, e, out);
      break;
    }
    typename T::Vector v[T::kVectors];
    T::load(x + i, v);
    e.units[0].take(x + i, v);
    for (int k = 0; k < T::kVectors; ++k) {
      const typename T::Vector d = v[k] - pivots;
      sum += widened(d);
      sum_sq += widened_squares(d);
    }
  }
  out.sum += lanes_total(sum);
  out.sum_sq += lanes_total(sum_sq);
  if (sizeof(x[0]) == 1) e.empty_lanes();
  for (const auto& unit : e.units) {
    if (unit.is_nan()) out.sum_sq = kNaN;
  }
  extremes = e;
  return out;
}

// ---- convert sums to a state ---------------------------------------------------------------

// The state of a chunk while its blocks are processed.
template <class T>
struct Running {
  Moments state;  // without minimum, maximum and zeros of the elements that are in `extremes`
  Extremes<T> extremes;
  typename T::Scalar pivot = 0;
  bool has_extremes = false;  // whether any element is in `extremes`
};

template <class T>
inline bool all_same(const typename T::Storage* x, int64_t n, int64_t zeros) {
  return zeros == n || __builtin_memcmp(x, x + 1, (n - 1) * sizeof(x[0])) == 0;
}

// Summarizes one block around the pivot, and again around the block's own mean if the pivot was too
// far from it. Returns false if the lanes cannot represent the block: it contains NaN or infinity,
// or d^2 overflows or underflows.
template <class T>
inline bool try_block(const typename T::Storage* x, int64_t n, Running<T>& r) {
  constexpr int kTries = 3;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    Extremes<T> extremes = r.extremes;
    const BlockSums s = block_sums<T>(x, n, r.pivot, extremes);
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
  typename T::Extremes all = r.extremes.units[0];
  for (int u = 1; u < kUnits<T>; ++u) all.join(r.extremes.units[u]);
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
  for (int64_t i = 0; i < n; i += kUnit<T>) {
    const int64_t size = n - i < kUnit<T> ? n - i : kUnit<T>;
    typename T::Storage padded[kUnit<T>] = {};
    __builtin_memcpy(padded, x + i, size * sizeof(x[0]));
    typename T::Vector v[T::kVectors];
    T::load(padded, v);
    for (int k = 0; k < T::kVectors; ++k) {
      for (int l = 0; l < T::kWidth; ++l) {
        const int e = T::element(k, l);
        if (e < size) values[i + e] = T::is_nan(padded[e]) ? kNaN : v[k][l];
      }
    }
  }
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
  }
  return finish(running);
}

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
                              chunk<Integer16<int16_t, Int16Lanes, UInt16Lanes, Int32Lanes>>,
                              chunk<Integer16<uint16_t, UInt16Lanes, UInt16Lanes, UInt32Lanes>>,
                              chunk<Integer32<int32_t, Int32Lanes>>,
                              chunk<Integer32<uint32_t, UInt32Lanes>>,
                              chunk<Native<int64_t, InDouble>>,
                              chunk<Native<uint64_t, InDouble>>,
                          }};
