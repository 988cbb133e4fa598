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

typedef uint64_t UInt64Lanes __attribute__((vector_size(kVectorBytes)));

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

// What block_sums computes of a piece in addition to the sums. (It fills the last vector with the
// first element. The hash includes these.)
template <class T>
struct RowExtremes {
  static_assert(kUnit<T> * sizeof(typename T::Storage) == kVectorBytes, "a unit is a vector");
  Converted<T> all = {};
  int64_t excluded_zeros = 0;
  RowHash hash = {};

  void take(int, const typename T::Storage* p, const typename T::Vector (&v)[T::kVectors]) {
    hash.take(p);
    all.take(p, v);
  }
  void exclude(double value, int64_t n) { excluded_zeros += value == 0 ? n : 0; }
  void empty_lanes() {}  // no lane is narrower than 32 bits
  // The sums show a NaN, unless the conversion turned it into a number above the largest one.
  bool is_nan() const {
    constexpr double kLargestNumber = 448;
    return T::kNaNIsNumber && (all.maximum() > kLargestNumber || all.minimum() < -kLargestNumber);
  }
  int64_t zero_count() const {
    return lanes_any(all.zeros) ? lanes_sum(all.zeros) - excluded_zeros : 0;
  }
};

// Reads a piece of n > 0 elements. Returns false if the lanes cannot represent it: it contains NaN
// or infinity, or d^2 overflows or underflows.
template <class T>
__attribute__((noinline)) bool try_row(const typename T::Storage* x, int64_t n,
                                       typename T::Scalar pivot, Moments& out) {
  constexpr int kTries = 3;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    RowExtremes<T> e;
    const BlockSums s = block_sums<T>(x, n, pivot, e);
    const Fit fit = from_sums({s.sum, s.sum_sq, e.all.minimum(), e.all.maximum(), e.zero_count()},
                              n, pivot, kMaxShiftShare, T::kMinSquares, kLargest, out);
    if (fit != Fit::kFar) return fit == Fit::kGood;
    pivot = static_cast<typename T::Scalar>(pivot + s.sum / static_cast<double>(n));
  }
  return false;
}

// Reads n <= kPart elements that the lanes of their dtype cannot represent.
template <class T>
__attribute__((noinline)) Moments difficult_row(const typename T::Storage* x, int64_t n) {
  Running<T> running;
  summarize_difficult_part<T>(x, n, running);
  return running.state;
}

inline RowState row_of(const Moments& state, uint64_t hash) {
  const int64_t nonfinite = state.count - finite_count(state);
  if (nonfinite == state.count) return {0, 0, 0, 0, nonfinite, hash};
  const double abs_max = state.max > -state.min ? state.max : -state.min;
  return {state.mean, state.m2, abs_max, state.zeros, nonfinite, hash};
}

// Vectors are reduced many at a time: lane l of the result is the reduction of the lanes of v[l].
// Each is reduced in the same order: first the halves of a vector, then their halves.
struct Sum {
  template <class V>
  static V of(V a, V b) {
    return a + b;
  }
};
struct Largest {
  template <class V>
  static V of(V a, V b) {
    return larger(a, b);
  }
};

// The even (kOdd = 0) or odd blocks of kSize lanes: of a and b in turns.
template <int kSize, int kOdd, class V>
inline V blocks(V a, V b) {
  typedef decltype((decltype(V{} == V{})){}) Index;
  V out;
#if defined(__clang__)
  for (int l = 0; l < kLanes<V>; ++l) {
    const int from = ((l / kSize & ~1) + kOdd) * kSize + l % kSize;
    out[l] = l / kSize % 2 == 0 ? a[from] : b[from];
  }
#else
  Index from;
  for (int l = 0; l < kLanes<V>; ++l) {
    from[l] = ((l / kSize & ~1) + kOdd) * kSize + l % kSize + l / kSize % 2 * kLanes<V>;
  }
  out = __builtin_shuffle(a, b, from);
#endif
  return out;
}

template <class Op, class V, int kNumber>
inline V reduced(const V (&v)[kNumber]) {
  constexpr int kHalf = kNumber / 2;
  V half[kHalf];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    half[i] = Op::of(blocks<kHalf, 0>(v[i], v[i + kHalf]), blocks<kHalf, 1>(v[i], v[i + kHalf]));
  }
  if constexpr (kHalf > 1) {
    return reduced<Op>(half);
  } else {
    return half[0];
  }
}

// Some rows: their lanes, summed around 0, and what follows from them. (Without constructors, which
// would clear them first.)
template <class T>
struct RowGroup {
  using V = typename T::Vector;
  static constexpr int kRows = kLanes<V>, kDoubles = kLanes<DoubleLanes>;
  DoubleLanes sum[kRows], sum_sq[kRows];
  UInt64Lanes hash[kRows];
  V min[kRows], max[kRows], abs_max[kRows];
  typename T::Mask zeros[kRows];

  // Sums row k, of n > 0 elements.
  __attribute__((always_inline)) void read(int k, const typename T::Storage* x, int64_t n) {
    constexpr int kStep = kUnits<T> * kUnit<T>, kTile = T::kInner * kStep;
    RowExtremes<T> e;
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
      for (int l = 0; l < T::kVectors; ++l) sums.add(LaneSums<T>{v[l], v[l] * v[l]});
    }
    if (i < n) {
      // The last elements, at the end of a unit: after other elements of the row, for the extremes,
      // and after zeros.
      constexpr int64_t kSize = sizeof(x[0]);
      typename T::Storage last[kUnit<T>], padded[kUnit<T>] = {};
      for (int l = 0; l < kUnit<T>; ++l) last[l] = element_at(x);
      const int64_t known = n < kUnit<T> ? n : kUnit<T>;
      __builtin_memcpy(last + kUnit<T> - known, x + n - known, known * kSize);
      __builtin_memcpy(padded + kUnit<T> - (n - i), x + i, (n - i) * kSize);
      T::load(last, v);
      const auto before = e.all.zeros;
      e.all.take(last, v);
      e.all.zeros = before;
      T::load(padded, v);
      for (int l = 0; l < T::kVectors; ++l) {
        sums.add(LaneSums<T>{v[l], v[l] * v[l]});
        count_zeros(e.all.zeros, v[l]);
      }
      e.hash.take(padded);
    }
    sum[k] = sums.sum;
    sum_sq[k] = sums.sum_sq;
    hash[k] = e.hash.sums;
    min[k] = e.all.min;
    max[k] = e.all.max;
    abs_max[k] = larger(e.all.max, -e.all.min);
    zeros[k] = e.all.zeros;
  }
  void clear(int k) {
    sum[k] = sum_sq[k] = DoubleLanes{};
    hash[k] = UInt64Lanes{};
    min[k] = max[k] = abs_max[k] = V{};
    zeros[k] = typename T::Mask{};
  }
};

// The elements of rows that were accepted with the pivot 0. The square of their sum is small, too.
template <class T>
struct AcceptedRows {
  DoubleLanes sum = {}, sum_sq = {};
  typename T::Vector min = typename T::Vector{} + kInfinity;
  typename T::Vector max = typename T::Vector{} - kInfinity;
  int64_t rows = 0, zeros = 0;

  Moments state(int64_t n) const {
    Moments out;
    if (rows == 0) return out;
    from_sums({lanes_total(sum), lanes_total(sum_sq), lanes_min(min), lanes_max(max), zeros},
              rows * n, 0, 1, 0, kLargest, out);
    return out;
  }
};

template <class T>
Moments rows(const void* data, int64_t number, int64_t n, RowState* out) {
  using Group = RowGroup<T>;
  constexpr int kRows = Group::kRows, kDoubles = Group::kDoubles;
  constexpr double kMaxRowShare = 1.0 / 6;
  // The sums of all rows of a chunk do not overflow.
  constexpr double kMaxSquares = kLargest / kChunk;
  constexpr double kMinSquares = T::kMinSquares > 0 ? T::kMinSquares : 0x1p-1074;
  const auto* x = static_cast<const typename T::Storage*>(data);
  const double divisor = static_cast<double>(n);
  const int64_t padding = (kUnit<T> - n % kUnit<T>) % kUnit<T>;
  AcceptedRows<T> accepted;
  Moments others;
  Group group;
  for (int64_t r = 0; r < number; r += kRows, x += kRows * n, out += kRows) {
    const int size = number - r < kRows ? static_cast<int>(number - r) : kRows;
    for (int k = 0; k < size; ++k) group.read(k, x + k * n, n);
    for (int k = size; k < kRows; ++k) group.clear(k);
    double mean[kRows], m2[kRows], squares[kRows];
    uint64_t hash[kRows];
    int64_t good[kRows];
    DoubleLanes sum_of_all = {}, squares_of_all = {};
    Int64Lanes all_good = ~Int64Lanes{};
#pragma GCC unroll 4
    for (int k = 0; k < kRows; k += kDoubles) {
      DoubleLanes sums[kDoubles], sums_sq[kDoubles];
      UInt64Lanes hashes[kDoubles];
      __builtin_memcpy(sums, group.sum + k, sizeof(sums));
      __builtin_memcpy(sums_sq, group.sum_sq + k, sizeof(sums));
      __builtin_memcpy(hashes, group.hash + k, sizeof(sums));
      const DoubleLanes sum = reduced<Sum>(sums), sum_sq = reduced<Sum>(sums_sq);
      const UInt64Lanes hashes_of = reduced<Sum>(hashes);
      const DoubleLanes shift = sum / divisor, shift_squares = sum * shift;
      const DoubleLanes m2s = sum_sq - shift_squares;
      const Int64Lanes fit = (Int64Lanes)(sum_sq >= kMinSquares) &
                             (Int64Lanes)(sum_sq <= kMaxSquares) &
                             (Int64Lanes)(shift_squares <= sum_sq * kMaxRowShare);
      __builtin_memcpy(mean + k, &shift, sizeof(shift));
      __builtin_memcpy(m2 + k, &m2s, sizeof(shift));
      __builtin_memcpy(squares + k, &sum_sq, sizeof(shift));
      __builtin_memcpy(hash + k, &hashes_of, sizeof(shift));
      __builtin_memcpy(good + k, &fit, sizeof(shift));
      all_good &= fit;
      sum_of_all += sum;
      squares_of_all += sum_sq;
    }
    const typename T::Vector abs_max = reduced<Largest>(group.abs_max);
    typename T::Mask zeros = {}, any_zeros = group.zeros[0];
    for (int k = 1; k < kRows; ++k) any_zeros |= group.zeros[k];
    if (lanes_any(any_zeros)) zeros = reduced<Sum>(group.zeros) - static_cast<int>(padding);
    const bool has_nan = T::kNaNIsNumber && lanes_max(abs_max) > 448;
    if (!lanes_any(~all_good) && !has_nan) {
      for (int k = 0; k < kRows; ++k) {
        out[k] = {mean[k], m2[k], abs_max[k], zeros[k], 0, hash[k]};
        accepted.min = smaller(group.min[k], accepted.min);
        accepted.max = larger(group.max[k], accepted.max);
      }
      accepted.sum += sum_of_all;
      accepted.sum_sq += squares_of_all;
      accepted.rows += kRows;
      accepted.zeros += lanes_any(any_zeros) ? lanes_sum(zeros) : 0;
      continue;
    }
    for (int k = 0; k < size; ++k) {
      Moments state;
      const bool is_nan = T::kNaNIsNumber && abs_max[k] > 448;
      if (!is_nan && (good[k] || (abs_max[k] == 0 && squares[k] == 0))) {
        state = {
            n, zeros[k], 0, 0, 0, mean[k], m2[k], lanes_min(group.min[k]), lanes_max(group.max[k])};
      } else {
        const auto pivot = static_cast<typename T::Scalar>(mean[k]);
        const auto* row = x + k * n;
        if (!is_finite(pivot) || is_nan || !try_row<T>(row, n, pivot, state)) {
          state = difficult_row<T>(row, n);
        }
      }
      out[k] = row_of(state, hash[k]);
      others = merge(others, state);
    }
  }
  return merge(others, accepted.state(n));
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
