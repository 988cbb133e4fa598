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
// other. (Extremes of 16-bit dtypes need fewer registers, which leaves more of them for sums.)
template <class T>
constexpr int kSums = sizeof(typename T::Storage) == 2 ? kUnroll16 : kUnroll;
template <class T>
constexpr int kUnits = kSums<T> > T::kVectors ? kSums<T> / T::kVectors : 1;
template <class T>
constexpr int kGroup = kUnits<T> * T::kVectors;
template <class T>
constexpr int kUnit = T::kVectors * T::kWidth;  // elements

// Converts n elements to S.
template <class T, class S>
inline void convert(const typename T::Storage* x, int64_t n, S* out) {
  int64_t i = 0;
  typename T::Vector v[T::kVectors];
  for (; i + kUnit<T> <= n; i += kUnit<T>) {
    T::load(x + i, v);
    for (int k = 0; k < T::kVectors; ++k) {
      for (int l = 0; l < T::kWidth; ++l) {
        const int e = T::element(k, l);
        out[i + e] = T::is_nan(element_at(x + i + e)) ? static_cast<S>(kNaN) : v[k][l];
      }
    }
  }
  if (i == n) return;
  typename T::Storage padded[kUnit<T>] = {};
  S converted[kUnit<T>];
  __builtin_memcpy(padded, x + i, (n - i) * sizeof(x[0]));
  convert<T>(padded, kUnit<T>, converted);
  __builtin_memcpy(out + i, converted, (n - i) * sizeof(out[0]));
}

// Minimum, maximum and zeros of the elements so far, one set per unit. Narrow dtypes have one set
// only, because integer operations take one cycle.
template <class T>
struct Extremes {
  static constexpr int kSets = sizeof(typename T::Storage) <= 2 ? 1 : kUnits<T>;
  typename T::Extremes sets[kSets];
  int64_t zeros = 0;  // in addition to those in lanes

  void take(int unit, const typename T::Storage* p, const typename T::Vector (&v)[T::kVectors]) {
    sets[unit % kSets].take(p, v);
  }
  void exclude(double value, int64_t n) { zeros -= value == 0 ? n : 0; }
  bool is_nan() const {
    for (const auto& set : sets) {
      if (set.is_nan()) return true;
    }
    return false;
  }
  int64_t zero_count() const {
    auto lanes = sets[0].zeros;
    for (int s = 1; s < kSets; ++s) lanes += sets[s].zeros;
    return lanes_any(lanes) ? zeros + lanes_sum(lanes) : zeros;
  }
  void empty_lanes() {  // must be called before narrow lanes overflow
    zeros = zero_count();
    for (auto& set : sets) set.zeros -= set.zeros;
  }
};

// Sums in one vector.
template <class T>
struct LaneSums {
  typename T::Vector sum, sum_sq;

  LaneSums operator+(const LaneSums& other) const {
    return {sum + other.sum, sum_sq + other.sum_sq};
  }
};

// Sums of each vector of a group.
template <class T>
struct GroupSums {
  LaneSums<T> of[kGroup<T>];

  LaneSums<T> total() const {
    static_assert(kGroup<T> == 1 || kGroup<T> == 2 || kGroup<T> == 4, "");
    if constexpr (kGroup<T> == 4) return (of[0] + of[1]) + (of[2] + of[3]);
    if constexpr (kGroup<T> == 2) return of[0] + of[1];
    return of[0];
  }
};

// Adds a group to the sums, or lets the first group be the sums. kPivot = false: the pivot is 0,
// which is good enough for most tensors and saves the subtraction. E: see block_sums.
template <class T, bool kPivot, bool kIsFirst, class E>
inline __attribute__((always_inline)) void take_group(const typename T::Storage* x,
                                                      typename T::Vector pivot, E& e,
                                                      GroupSums<T>& out) {
  using V = typename T::Vector;
  constexpr int kStep = kUnits<T> * kUnit<T>;
#pragma GCC unroll 8
  for (int b = 0; b < static_cast<int>(kStep * sizeof(typename T::Storage)); b += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + kPrefetchBytes + b);
  }
#pragma GCC unroll 8
  for (int u = 0; u < kUnits<T>; ++u) {
    V v[T::kVectors];
    T::load(x + u * kUnit<T>, v);
    e.take(u, x + u * kUnit<T>, v);
#pragma GCC unroll 8
    for (int k = 0; k < T::kVectors; ++k) {
      const V d = kPivot ? v[k] - pivot : v[k];
      LaneSums<T>& sums = out.of[u * T::kVectors + k];
      sums.sum = kIsFirst ? d : sums.sum + d;
      sums.sum_sq = kIsFirst ? d * d : sums.sum_sq + d * d;
    }
  }
}

// Sums `groups` >= 1 groups of vectors.
template <class T, bool kPivot, class E>
inline __attribute__((always_inline)) LaneSums<T> take_tile(const typename T::Storage* x,
                                                            int groups, typename T::Vector pivot,
                                                            E& e) {
  constexpr int kStep = kUnits<T> * kUnit<T>;
  GroupSums<T> sums;
  take_group<T, kPivot, true>(x, pivot, e, sums);
#pragma GCC unroll kTileUnroll
  for (int g = 1; g < groups; ++g) {
    x += kStep;
    take_group<T, kPivot, false>(x, pivot, e, sums);
  }
  return sums.total();
}

// Adds the n < kUnit elements at x without reading beyond them. The rest of the unit is filled with
// the first element, which does not change the extremes, and is excluded from the sums.
template <class T, class E>
inline void take_remainder(const typename T::Storage* x, int64_t n, typename T::Vector pivot, E& e,
                           BlockSums& out) {
  using V = typename T::Vector;
  typename T::Storage padded[kUnit<T>];
  const auto first = element_at(x);
  for (int i = 0; i < kUnit<T>; ++i) padded[i] = first;
  __builtin_memcpy(padded, x, n * sizeof(x[0]));
  V v[T::kVectors];
  T::load(padded, v);
  e.take(0, padded, v);
  e.exclude(v[0][0], kUnit<T> - n);
  for (int k = 0; k < T::kVectors; ++k) {
    const V d = v[k] - pivot;
    for (int l = 0; l < T::kWidth; ++l) {
      if (T::element(k, l) >= n) continue;
      out.sum += d[l];
      out.sum_sq += static_cast<double>(d[l]) * d[l];
    }
  }
}

// Sums in float64 lanes.
struct DoubleSums {
  DoubleLanes sum = {}, sum_sq = {};

  template <class T>
  void add(const LaneSums<T>& lanes) {
    sum += widened(lanes.sum);
    sum_sq += widened(lanes.sum_sq);
  }
};

// Adds the extremes of the block to `extremes`, which is of type Extremes or NonzeroExtremes.
template <class T, class E>
inline BlockSums block_sums(const typename T::Storage* x, int64_t n, typename T::Scalar pivot,
                            E& extremes) {
  constexpr int kStep = kUnits<T> * kUnit<T>, kTile = T::kInner * kStep;
  E e = extremes;
  BlockSums out = {0, 0};
  const typename T::Vector pivots = typename T::Vector{} + pivot;
  DoubleSums sums;
  int64_t i = 0;
  if (pivot == 0) {
    // d = x has no rounding here, so the bound of the error allows two more additions.
    static_assert(kTilesAtZero == 4);
    for (; i + kTilesAtZero * kTile <= n; i += kTilesAtZero * kTile) {
      LaneSums<T> tiles[kTilesAtZero];
      for (int k = 0; k < kTilesAtZero; ++k) {
        tiles[k] = take_tile<T, false>(x + i + k * kTile, T::kInner, pivots, e);
      }
      sums.add((tiles[0] + tiles[1]) + (tiles[2] + tiles[3]));
    }
    for (; i + kTile <= n; i += kTile) sums.add(take_tile<T, false>(x + i, T::kInner, pivots, e));
  }
  for (; i + kTile <= n; i += kTile) sums.add(take_tile<T, true>(x + i, T::kInner, pivots, e));
  if (i + kStep <= n) {
    const int groups = static_cast<int>((n - i) / kStep);
    sums.add(take_tile<T, true>(x + i, groups, pivots, e));
    i += groups * kStep;
  }
  for (; i < n; i += kUnit<T>) {
    if (n - i < kUnit<T>) {
      take_remainder<T>(x + i, n - i, pivots, e, out);
      break;
    }
    typename T::Vector v[T::kVectors];
    T::load(x + i, v);
    e.take(0, x + i, v);
    for (int k = 0; k < T::kVectors; ++k) {
      const typename T::Vector d = v[k] - pivots;
      sums.add(LaneSums<T>{d, d * d});  // float32 squares, so that an overflow shows
    }
  }
  out.sum += lanes_total(sums.sum);
  out.sum_sq += lanes_total(sums.sum_sq);
  if constexpr (sizeof(x[0]) == 1) e.empty_lanes();
  if (e.is_nan()) out.sum_sq = kNaN;
  extremes = e;
  return out;
}

// Adds the extremes of a block alone.
template <class T>
inline void add_extremes(const typename T::Storage* x, int64_t n, Extremes<T>& extremes) {
  static_assert(T::kHasNonzero, "whose extremes do not use the converted elements");
  Extremes<T> e = extremes;
  const typename T::Vector unused[T::kVectors] = {};
  int64_t i = 0;
  for (; i + kUnit<T> <= n; i += kUnit<T>) e.take(0, x + i, unused);
  if (i < n) {
    BlockSums unused_sums = {0, 0};
    take_remainder<T>(x + i, n - i, typename T::Vector{}, e, unused_sums);
  }
  extremes = e;
}
