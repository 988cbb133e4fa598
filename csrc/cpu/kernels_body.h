// The kernels, once for every SIMD level: kernels_plain.cpp, kernels_avx2.cpp and
// kernels_avx512.cpp each include this file inside a namespace of their own, with the target
// switched on around it and kVectorBytes and kUnroll set. No include guard, no other include and no
// std:: template in here: what is instantiated inside the switched region may use instructions
// that the rest of the program must not.
//
// The naive version, which this computes to within the bound below:
//
//     for x in chunk: zeros += x == 0; min, max = ...; mean = sum(x) / n; m2 = sum((x - mean)^2)
//
// The work is done in blocks of kBlock elements. Each sums d = x - pivot and d^2 in SIMD lanes,
// pivot being a value close to the block's mean (the mean of an earlier block), so that
//
//     mean = pivot + sum(d) / n           m2 = sum(d^2) - sum(d)^2 / n
//
// takes one read and the subtraction is small: a block is accepted only if the pivot lay within a
// quarter of a standard deviation of its mean, sum(d)^2 / n <= sum(d^2) / 16. If not, it is done
// again (in L1) around its own mean.
//
// Error of an accepted float32 block, u = 2^-24: a sum grows by at most kInner = 8 additions in a
// float32 lane and 2 more across lanes before it is widened to float64, where rounding no longer
// counts. With the rounding of d itself, sum(d) is off by less than 11u sum|d| and sum(d^2) by less
// than 13u sum(d^2). |sum d| <= sqrt(n sum(d^2)) / 4, so m2 is off by at most
// (13 + 2 * 11 / 4) u sum(d^2) <= 18.5u (16/15) m2 = 1.2e-6 m2: std, and norm, by 6e-7 of
// themselves if every rounding went the same way; the mean by 11u rms(d) = 7e-7 rms. In practice
// roundings cancel and both stay below 1e-7. Integers of 32 bits and more, and float64, have
// float64 lanes: the same with u = 2^-53.

#include "lanes_body.h"

constexpr int kInner = 8;             // additions in a lane before it is widened to float64
constexpr int kPrefetchBytes = 4096;  // how far ahead of the read memory is asked for

// ---- sums of one block ---------------------------------------------------------------------

// The first size < kWidth lanes from x, without reading past them.
template <class T>
inline typename T::Vector load_part(const typename T::Storage* x, int64_t size) {
  typename T::Storage padded[T::kWidth] = {};
  __builtin_memcpy(padded, x, size * sizeof(typename T::Storage));
  return T::load(padded);
}

// One of the kUnroll independent streams of a block, so that additions need not wait for each
// other.
template <class T>
struct Stream {
  using V = typename T::Vector;
  V sum, sum_sq;  // since the last fold
  V min, max;
  typename T::Mask zeros;

  void take(V v, typename T::Scalar pivot) {
    const V d = v - pivot;
    sum += d;
    sum_sq += d * d;
    min = v < min ? v : min;
    max = v > max ? v : max;
    zeros -= (typename T::Mask)(v == 0);
  }
};

// Adds the streams' sums to float64 lanes and starts them anew.
template <class T>
inline void fold(Stream<T> (&streams)[kUnroll], DoubleLanes& sum, DoubleLanes& sum_sq) {
  for (int half = kUnroll / 2; half > 0; half /= 2) {
    for (int u = 0; u < half; ++u) {
      streams[u].sum += streams[u + half].sum;
      streams[u].sum_sq += streams[u + half].sum_sq;
    }
  }
  sum += T::widened(streams[0].sum);
  sum_sq += T::widened(streams[0].sum_sq);
  for (auto& s : streams) s.sum = s.sum_sq = typename T::Vector{};
}

template <class T>
inline ShiftedSums block_sums(const typename T::Storage* x, int64_t n, typename T::Scalar pivot) {
  using V = typename T::Vector;
  constexpr int kWidth = T::kWidth;
  constexpr int kStep = kUnroll * kWidth;  // elements
  constexpr int kStepBytes = kStep * static_cast<int>(sizeof(typename T::Storage));

  ShiftedSums out = {0, 0, 0, 0, 0};
  int64_t i = 0;
  if (n >= kWidth) {
    const V first = T::load(x);
    Stream<T> streams[kUnroll];
    for (auto& s : streams) s = {V{}, V{}, first, first, typename T::Mask{}};
    DoubleLanes sum = {}, sum_sq = {};
    const auto* ahead = reinterpret_cast<const char*>(x) + kPrefetchBytes;
    while (i + kStep <= n) {
      const int64_t steps = (n - i) / kStep;
      const int64_t end = i + (steps < kInner ? steps : kInner) * kStep;
      for (; i < end; i += kStep, ahead += kStepBytes) {
        for (int b = 0; b < kStepBytes; b += 64) __builtin_prefetch(ahead + b);
        for (int u = 0; u < kUnroll; ++u) streams[u].take(T::load(x + i + u * kWidth), pivot);
      }
      fold(streams, sum, sum_sq);
    }
    for (; i + kWidth <= n; i += kWidth) streams[0].take(T::load(x + i), pivot);
    fold(streams, sum, sum_sq);

    for (int l = 0; l < static_cast<int>(sizeof(sum) / sizeof(sum[0])); ++l) {
      out.sum += sum[l];
      out.sum_sq += sum_sq[l];
    }
    Stream<T>& all = streams[0];
    for (int u = 1; u < kUnroll; ++u) {
      all.min = streams[u].min < all.min ? streams[u].min : all.min;
      all.max = streams[u].max > all.max ? streams[u].max : all.max;
      all.zeros += streams[u].zeros;
    }
    typename T::Scalar min = all.min[0], max = all.max[0];
    for (int l = 0; l < kWidth; ++l) {
      min = all.min[l] < min ? all.min[l] : min;
      max = all.max[l] > max ? all.max[l] : max;
      out.zeros += all.zeros[l];
    }
    out.min = min;
    out.max = max;
  }
  if (i < n) {  // fewer than kWidth are left: convert them in a padded vector, take them one by one
    const V v = load_part<T>(x + i, n - i);
    if (i == 0) out.min = out.max = v[0];
    for (int l = 0; l < n - i; ++l) {
      const double value = v[l];
      const double d = value - pivot;
      out.sum += d;
      out.sum_sq += d * d;
      out.min = value < out.min ? value : out.min;
      out.max = value > out.max ? value : out.max;
      out.zeros += value == 0;
    }
  }
  return out;
}

// ---- from sums to a state ------------------------------------------------------------------

// One block around a pivot, moved to the block's own mean where it was too far off. False: the
// lanes could not hold the block (it has a NaN or an infinity, or d^2 over- or underflows).
template <class T>
inline bool try_block(const typename T::Storage* x, int64_t n, typename T::Scalar& pivot,
                      Moments& out) {
  constexpr int kTries = 3;
  constexpr double kMostOff = 1.0 / 16;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const ShiftedSums s = block_sums<T>(x, n, pivot);
    const Fit fit = from_sums(s, n, pivot, kMostOff, T::kLeastSquares, T::kMostSquares, out);
    if (fit != Fit::kFar) return fit == Fit::kGood;
    pivot = static_cast<typename T::Scalar>(pivot + s.sum / static_cast<double>(n));
  }
  return false;
}

// A block of any content. Three roads, each slower and surer than the one before: the lanes of
// its type; float64 lanes on a converted copy; the exact routine, which knows NaN and infinity.
template <class T>
inline Moments block(const typename T::Storage* x, int64_t n, typename T::Scalar& pivot) {
  Moments out;
  if (try_block<T>(x, n, pivot, out)) return out;

  constexpr int kWidth = T::kWidth;
  double values[kBlock];
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t size = n - i < kWidth ? n - i : kWidth;
    const typename T::Vector v = size < kWidth ? load_part<T>(x + i, size) : T::load(x + i);
    for (int64_t l = 0; l < size; ++l) values[i + l] = v[l];
  }
  if constexpr (sizeof(typename T::Scalar) == 4) {
    double own_pivot = values[0];
    if (try_block<Native<double, InDouble>>(values, n, own_pivot, out)) return out;
  }
  out = Moments();
  update(out, values, n);
  // A pivot that is not finite would send every later block down this road.
  pivot = static_cast<typename T::Scalar>(out.mean);
  return out;
}

template <class T>
Moments chunk(const void* data, int64_t n) {
  const auto* x = static_cast<const typename T::Storage*>(data);
  Moments state;
  typename T::Scalar pivot = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const Moments next = block<T>(x + i, n - i < kBlock ? n - i : kBlock, pivot);
    state = merge(state, next);
  }
  return state;
}

const Kernels kKernels = {PARAMSTATS_LEVEL_NAME,
                          {
                              chunk<Native<double, InDouble>>,
                              chunk<Native<float, InFloat>>,
                              chunk<BFloat16>,
                              chunk<Float16>,
                              chunk<Float8E4M3FN>,
                              chunk<Float8E5M2>,
                              chunk<NarrowInteger<int8_t>>,
                              chunk<NarrowInteger<uint8_t>>,
                              chunk<Bool>,
                              chunk<NarrowInteger<int16_t>>,
                              chunk<NarrowInteger<uint16_t>>,
                              chunk<Native<int32_t, InDouble>>,
                              chunk<Native<uint32_t, InDouble>>,
                              chunk<Native<int64_t, InDouble>>,
                              chunk<Native<uint64_t, InDouble>>,
                          }};
