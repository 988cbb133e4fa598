// The states of rows. A part of kernels_body.h, which includes it once per SIMD level and states
// the rules for its code.
//
// A row is read in pieces of row_piece(dtype) elements (kernels.h). Each is summed around the pivot
// 0 and, if that is too far from its mean, again around its mean. What is computed of a row does
// not depend on other rows, so that equal rows have equal states.
//
// The hash of a piece is NH (Black et al.: "UMAC: fast and secure message authentication", CRYPTO
// 1999) of its memory as 32-bit words w, padded to whole vectors:
//
//     sum over i of (w[2i] + key[2i] mod 2^32) * (w[2i+1] + key[2i+1] mod 2^32)      mod 2^64

struct RowKeys {
  uint32_t of[kRowPieceBytes / sizeof(uint32_t)];

  constexpr RowKeys() : of() {
    uint64_t i = 0;
    for (uint32_t& key : of) key = static_cast<uint32_t>(hash_key(++i) >> 32);
  }
};
alignas(64) constexpr RowKeys kRowKeys;

// The product of the two halves of each lane.
inline UInt64Lanes times_halves(UInt64Lanes v) {
#if defined(PARAMSTATS_TIMES_HALVES)
  return (UInt64Lanes)PARAMSTATS_TIMES_HALVES(v);
#else
  return (v & 0xffffffff) * (v >> 32);
#endif
}

struct RowHash {
  UInt64Lanes sums = {};
  const uint32_t* keys = kRowKeys.of;

  void take(const void* vector) {
    const auto words = load_as<UInt32Lanes>(static_cast<const char*>(vector));
    sums += times_halves((UInt64Lanes)(words + load_as<UInt32Lanes>(keys)));
    keys += kLanes<UInt32Lanes>;
  }
  uint64_t value() const {
    uint64_t sum = 0;
    for (int l = 0; l < kLanes<UInt64Lanes>; ++l) sum += sums[l];
    return sum;
  }
};

// The extremes of a row: of narrow floats as the integers in memory.
template <class T, class = typename T::Extremes>
struct OfRow {
  using Extremes = Converted<T>;
};
template <class T, class Unsigned, class Signed>
struct OfRow<T, SignMagnitude<T, Unsigned, Signed>> {
  using Extremes = SignMagnitude<T, Unsigned, Signed>;
};

// The largest absolute values and the numbers of zeros, at most 255 in a lane.
template <class T>
inline typename T::Vector abs_max_of(const Converted<T>& e) {
  return larger(e.max, -e.min);
}
template <class T>
inline typename T::Mask zeros_of(const Converted<T>& e) {
  return e.zeros;
}
template <class T, class Unsigned, class Signed>
inline FloatLanes abs_max_of(const SignMagnitude<T, Unsigned, Signed>& e) {
  const auto positive = (Unsigned)(e.max_signed > 0 ? e.max_signed : Signed{});
  const Unsigned any = e.max_bits & (Unsigned{} + e.kMagnitude);
  const Unsigned magnitude = positive > any ? positive : any;
  typename T::Storage bits[kUnit<T>];
  FloatLanes v[T::kVectors];
  __builtin_memcpy(bits, &magnitude, sizeof(bits));
  T::load(bits, v);
  for (int k = 1; k < T::kVectors; ++k) v[0] = larger(v[k], v[0]);
  return v[0];
}
template <class T, class Unsigned, class Signed>
inline Int32Lanes zeros_of(const SignMagnitude<T, Unsigned, Signed>& e) {
  auto n = (UInt32Lanes)e.zeros;
  if constexpr (sizeof(typename T::Storage) == 1) n = (n & 0xff00ff) + (n >> 8 & 0xff00ff);
  return (Int32Lanes)((n & 0xffff) + (n >> 16));
}

// What is computed of a row in addition to its sums.
template <class T>
struct ExtremesAndHash {
  typename OfRow<T>::Extremes extremes = {};
  RowHash hash = {};

  __attribute__((always_inline)) void take(int, const typename T::Storage* p,
                                           const typename T::Vector (&v)[T::kVectors]) {
    hash.take(p);
    extremes.take(p, v);
  }
  // The last elements of a row: in `last` after other elements of it, in `padded` after zeros.
  void take_last(const typename T::Storage* last, const typename T::Storage* padded,
                 typename T::Vector (&v)[T::kVectors]) {
    auto counted = extremes;
    T::load(last, v);
    extremes.take(last, v);
    T::load(padded, v);
    counted.take(padded, v);
    extremes.zeros = counted.zeros;
    hash.take(padded);
  }
};

// Reads n <= kPart elements alone, with a pivot near their mean.
template <class T>
__attribute__((noinline)) Moments one_row(const typename T::Storage* x, int64_t n, double pivot) {
  Running<T> running;
  if (is_finite(pivot)) running.pivot = static_cast<typename T::Scalar>(pivot);
  if (!try_block<T>(x, n, running)) summarize_difficult_part<T>(x, n, running);
  return finish(running);
}

// The largest accepted sum^2 / n as a share of the sum of squares. With the pivot 0 and at most 9
// float32 additions, the error of m2 is at most (10 + 2 * 9 * sqrt(1/6)) u (6/5) m2 = 20.8u m2 and
// that of the mean 9u sqrt(6/5) std = 9.9u std, which together are within the bound of a tensor.
constexpr double kMaxRowShare = 1.0 / 6;

inline RowState row_of(const Moments& state, uint64_t hash) {
  const int64_t nonfinite = state.count - finite_count(state);
  if (nonfinite == state.count) return {0, 0, 0, 0, nonfinite, hash};
  const double abs_max = state.max > -state.min ? state.max : -state.min;
  return {state.mean, state.m2, abs_max, state.zeros, nonfinite, hash};
}

// The lanes of some rows, summed around 0. (Without constructors, which would clear them first.)
template <class T>
struct RowGroup {
  using V = typename T::Vector;
  static constexpr int kRows = kLanes<V>, kDoubles = kLanes<DoubleLanes>;
  DoubleLanes sum[kRows / kDoubles][kDoubles], sum_sq[kRows / kDoubles][kDoubles];
  UInt64Lanes hash[kRows / kDoubles][kDoubles];
  V abs_max[kRows];
  typename T::Mask zeros[kRows];

  // Sums row k, which has 1 <= `groups` <= kInner groups of vectors.
  __attribute__((always_inline)) void read_tile(int k, const typename T::Storage* x, int groups,
                                                typename OfRow<T>::Extremes& all) {
    ExtremesAndHash<T> e;
    const LaneSums<T> sums = take_tile<T, false>(x, groups, V{}, e);
    set(k, {widened(sums.sum), widened(sums.sum_sq)}, e.hash.sums, abs_max_of(e.extremes),
        zeros_of(e.extremes));
    all.join(e.extremes);
  }
  // Sums row k, of n > 0 elements.
  __attribute__((always_inline)) void read(int k, const typename T::Storage* x, int64_t n,
                                           typename OfRow<T>::Extremes& all) {
    constexpr int kStep = kUnits<T> * kUnit<T>, kTile = T::kInner * kStep;
    ExtremesAndHash<T> e;
    DoubleSums sums;
    int64_t i = 0;
    for (; i + kTile <= n; i += kTile) sums.add(take_tile<T, false>(x + i, T::kInner, V{}, e));
    if (i + kStep <= n) {
      const int groups = static_cast<int>((n - i) / kStep);
      sums.add(take_tile<T, false>(x + i, groups, V{}, e));
      i += groups * kStep;
    }
    V v[T::kVectors];
    for (; i + kUnit<T> <= n; i += kUnit<T>) {
      T::load(x + i, v);
      e.take(0, x + i, v);
      for (const V& lanes : v) sums.add(LaneSums<T>{lanes, lanes * lanes});
    }
    if (i < n) {
      constexpr int64_t kSize = sizeof(x[0]);
      const int64_t known = n < kUnit<T> ? n : kUnit<T>;
      typename T::Storage last[kUnit<T>], padded[kUnit<T>] = {};
      for (auto& element : last) element = element_at(x);
      __builtin_memcpy(last + kUnit<T> - known, x + n - known, known * kSize);
      __builtin_memcpy(padded + kUnit<T> - (n - i), x + i, (n - i) * kSize);
      e.take_last(last, padded, v);
      for (const V& lanes : v) sums.add(LaneSums<T>{lanes, lanes * lanes});
    }
    set(k, sums, e.hash.sums, abs_max_of(e.extremes), zeros_of(e.extremes));
    all.join(e.extremes);
  }
  void clear(int k) { set(k, DoubleSums(), UInt64Lanes{}, V{}, typename T::Mask{}); }
  void set(int k, const DoubleSums& sums, UInt64Lanes hashes, V largest,
           typename T::Mask zero_lanes) {
    sum[k / kDoubles][k % kDoubles] = sums.sum;
    sum_sq[k / kDoubles][k % kDoubles] = sums.sum_sq;
    hash[k / kDoubles][k % kDoubles] = hashes;
    abs_max[k] = largest;
    zeros[k] = zero_lanes;
  }
};

// Adds the extremes of a row whose group has a row that is not accepted.
template <class T>
__attribute__((noinline)) void read_again(RowGroup<T>& unused, const typename T::Storage* x,
                                          int64_t n, typename OfRow<T>::Extremes& all) {
  unused.read(0, x, n, all);
}

// The elements of all rows that need no other pivot than 0.
template <class T>
struct RowTotals {
  DoubleLanes sum = {}, sum_sq = {};
  typename OfRow<T>::Extremes all = {};
  int64_t count = 0, zeros = 0;

  Moments state() const {
    Moments out;
    if (count == 0) return out;
    from_sums({lanes_total(sum), lanes_total(sum_sq), all.minimum(), all.maximum(), zeros}, count,
              0, 1, 0, kLargest, out);
    return out;
  }
};

template <class T>
Moments rows(const void* data, int64_t number, int64_t n, RowState* out) {
  using Group = RowGroup<T>;
  constexpr int kRows = Group::kRows, kDoubles = Group::kDoubles, kStep = kUnits<T> * kUnit<T>;
  constexpr double kMinSquares = T::kMinSquares > 0 ? T::kMinSquares : 0x1p-1074;
  constexpr double kMaxSquares = kLargest / kChunk;  // sums of them do not overflow
  constexpr double kLargestNumber = T::kNaNIsNumber ? 448 : kInfinity;
  const auto* x = static_cast<const typename T::Storage*>(data);
  const double divisor = static_cast<double>(n);
  const int padding = static_cast<int>((kUnit<T> - n % kUnit<T>) % kUnit<T>);
  RowTotals<T> totals;
  Moments others;
  Group group;
  for (int64_t r = 0; r < number; r += kRows, x += kRows * n, out += kRows) {
    const int size = number - r < kRows ? static_cast<int>(number - r) : kRows;
    auto all = totals.all;
    if (n <= T::kInner * kStep && n % kStep == 0) {
      const int groups = static_cast<int>(n) / kStep;
      for (int k = 0; k < size; ++k) group.read_tile(k, x + k * n, groups, all);
    } else {
      for (int k = 0; k < size; ++k) group.read(k, x + k * n, n, all);
    }
    for (int k = size; k < kRows; ++k) group.clear(k);
    const auto abs_max = reduced<Largest>(group.abs_max);
    DoubleLanes largest[kRows / kDoubles];
    if constexpr (kRows == kDoubles) {
      largest[0] = abs_max;
    } else {
      largest[0] = doubles<0>(abs_max);
      largest[1] = doubles<1>(abs_max);
    }
    typename T::Mask zeros = group.zeros[0];
    for (int k = 1; k < kRows; ++k) zeros |= group.zeros[k];
    const bool has_zeros = lanes_any(zeros);
    if (has_zeros) zeros = reduced<Sum>(group.zeros) - padding;

    double mean[kRows], m2[kRows];
    uint64_t hash[kRows];
    int64_t fit[kRows];
    Int64Lanes all_fit = ~Int64Lanes{};
#pragma GCC unroll 2
    for (int p = 0; p < kRows / kDoubles; ++p) {
      const DoubleLanes sum = reduced<Sum>(group.sum[p]), sum_sq = reduced<Sum>(group.sum_sq[p]);
      const UInt64Lanes hashes = reduced<Sum>(group.hash[p]);
      const DoubleLanes shift = sum / divisor, shift_squares = sum * shift;
      const DoubleLanes rest = sum_sq - shift_squares;
      const Int64Lanes fits = (Int64Lanes)(largest[p] <= kLargestNumber) &
                              (Int64Lanes)(sum_sq <= kMaxSquares) &
                              (((Int64Lanes)(sum_sq >= kMinSquares) &
                                (Int64Lanes)(shift_squares <= sum_sq * kMaxRowShare)) |
                               ((Int64Lanes)(largest[p] == 0) & (Int64Lanes)(sum_sq == 0)));
      __builtin_memcpy(mean + p * kDoubles, &shift, sizeof(shift));
      __builtin_memcpy(m2 + p * kDoubles, &rest, sizeof(rest));
      __builtin_memcpy(hash + p * kDoubles, &hashes, sizeof(hashes));
      __builtin_memcpy(fit + p * kDoubles, &fits, sizeof(fits));
      all_fit &= fits;
      totals.sum += (DoubleLanes)((Int64Lanes)sum & fits);
      totals.sum_sq += (DoubleLanes)((Int64Lanes)sum_sq & fits);
    }
    for (int k = 0; k < size; ++k) out[k] = {mean[k], m2[k], abs_max[k], zeros[k], 0, hash[k]};
    if (!lanes_any(~all_fit)) {
      totals.all = all;
      totals.count += size * n;
      for (int k = 0; has_zeros && k < size; ++k) totals.zeros += zeros[k];
      continue;
    }
    for (int k = 0; k < size; ++k) {
      if (fit[k]) {
        read_again(group, x + k * n, n, totals.all);
        totals.count += n;
        totals.zeros += zeros[k];
      } else {
        const Moments state = one_row<T>(x + k * n, n, mean[k]);
        out[k] = row_of(state, hash[k]);
        others = merge(others, state);
      }
    }
  }
  return merge(others, totals.state());
}

template <class S>
Moments rows_of_bytes(const void* data, int64_t number, int64_t n, RowState* out) {
  const auto* x = static_cast<const char*>(data);
  Moments all;
  for (int64_t r = 0; r < number; ++r, x += n) {
    const Moments state = chunk_of_bytes<S>(x, n);
    RowHash hash;
    int64_t i = 0;
    for (; i + kVectorBytes <= n; i += kVectorBytes) hash.take(x + i);
    char last[kVectorBytes] = {};
    __builtin_memcpy(last, x + i, n - i);
    hash.take(last);
    out[r] = row_of(state, hash.value());
    all = merge(all, state);
  }
  return all;
}
