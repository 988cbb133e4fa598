// The sums of one block around a pivot. A part of kernels_body.h, which includes it once per SIMD
// level and states the rules for its code.

// Reads an element at any address, aligned or not.
template <class S>
inline S element_at(const S* x) {
  S value;
  __builtin_memcpy(&value, x, sizeof(value));
  return value;
}

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
