// The states of rows. A part of kernels_body.h, which includes it once per SIMD level and states
// the rules for its code.
//
// A row is read in pieces of row_piece(dtype) elements (kernels.h). Each is summed around the pivot
// 0 and, if that is too far from its mean, again around its mean. What is computed of a row does
// not depend on other rows, so that equal rows have equal states.

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
  const double abs_max = state.max > -state.min ? state.max : 0 - state.min;  // not -0
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
                                                typename OfRow<T>::First& all) {
    ExtremesAndHash<T> e;
    const LaneSums<T> sums = take_tile<T, false>(x, groups, V{}, e);
    set(k, {widened(sums.sum), widened(sums.sum_sq)}, e.hash.sums, abs_max_of(e.first),
        zeros_of(e.first));
    all.join(e.first);
  }
  // Sums row k, of n > 0 elements.
  __attribute__((always_inline)) void read(int k, const typename T::Storage* x, int64_t n,
                                           typename OfRow<T>::First& all) {
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
      const LastUnit<T> last(x, n);
      take_last<T>(last, e.first);
      e.hash.take(last.padded);
      T::load(last.padded, v);
      for (const V& lanes : v) sums.add(LaneSums<T>{lanes, lanes * lanes});
    }
    set(k, sums, e.hash.sums, abs_max_of(e.first), zeros_of(e.first));
    all.join(e.first);
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
    typename OfRow<T>::First first;
    if (n <= T::kInner * kStep && n % kStep == 0) {
      const int groups = static_cast<int>(n) / kStep;
      for (int k = 0; k < size; ++k) group.read_tile(k, x + k * n, groups, first);
    } else {
      for (int k = 0; k < size; ++k) group.read(k, x + k * n, n, first);
    }
    for (int k = size; k < kRows; ++k) group.clear(k);
    auto all = totals.all;
    if (!add_first(first, all)) {
      for (int k = 0; k < size; ++k) {
        const auto e = extremes_of_row<T>(x + k * n, n);
        group.abs_max[k] = abs_max_of(e);
        group.zeros[k] = zeros_of(e);
        all.join(e);
      }
    }
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
        totals.all.join(extremes_of_row<T>(x + k * n, n));
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
