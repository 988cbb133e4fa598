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
// or infinity, or d^2 overflows or underflows. Always writes the hash.
template <class T>
inline bool try_row(const typename T::Storage* x, int64_t n, typename T::Scalar pivot, Moments& out,
                    uint64_t& hash) {
  constexpr int kTries = 3;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    RowExtremes<T> e;
    const BlockSums s = block_sums<T>(x, n, pivot, e);
    hash = e.hash.value();
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

// The lanes of some rows, summed around 0. (Without constructors, which would clear them first.)
template <class T>
struct RowLanes {
  static constexpr int kRows = 16;
  DoubleLanes sum[kRows], sum_sq[kRows];
  typename T::Vector min[kRows], max[kRows];
  typename T::Mask zeros[kRows];
  UInt64Lanes hash[kRows];

  // Sums row k, of n > 0 elements, as block_sums does. `n` is a whole number of units.
  __attribute__((always_inline)) void read(int k, const typename T::Storage* x, int64_t n) {
    using V = typename T::Vector;
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
    for (; i < n; i += kUnit<T>) {
      V v[T::kVectors];
      T::load(x + i, v);
      e.take(0, x + i, v);
      for (int l = 0; l < T::kVectors; ++l) sums.add(LaneSums<T>{v[l], v[l] * v[l]});
    }
    sum[k] = sums.sum;
    sum_sq[k] = e.is_nan() ? sums.sum_sq + kNaN : sums.sum_sq;
    min[k] = e.all.min;
    max[k] = e.all.max;
    zeros[k] = e.all.zeros;
    hash[k] = e.hash.sums;
  }
  Fit state(int k, int64_t n, double* total, Moments& out) const {
    *total = lanes_total(sum[k]);
    const int64_t n_zeros = lanes_any(zeros[k]) ? lanes_sum(zeros[k]) : 0;
    return from_sums(
        {*total, lanes_total(sum_sq[k]), lanes_min(min[k]), lanes_max(max[k]), n_zeros}, n, 0,
        kMaxShiftShare, T::kMinSquares, kLargest, out);
  }
};

// Merges the states of rows of n finite elements each.
inline Moments merged(const Moments* states, int64_t rows, int64_t n) {
  Moments out;
  const double first = states[0].mean;
  double sum = 0, sum_sq = 0;  // of the distances of the means from `first`
  for (int64_t r = 0; r < rows; ++r) {
    const double d = states[r].mean - first;
    sum += d;
    sum_sq += d * d;
    out.m2 += states[r].m2;
    out.zeros += states[r].zeros;
    out.min = states[r].min < out.min ? states[r].min : out.min;
    out.max = states[r].max > out.max ? states[r].max : out.max;
  }
  const double shift = sum / static_cast<double>(rows), between = sum_sq - sum * shift;
  out.count = rows * n;
  out.mean = first + shift;
  out.m2 += static_cast<double>(n) * (between > 0 ? between : 0);
  return out;
}

template <class T>
Moments rows(const void* data, int64_t number, int64_t n, RowState* out) {
  constexpr int kRows = RowLanes<T>::kRows;
  const auto* x = static_cast<const typename T::Storage*>(data);
  Moments all;
  for (int64_t r = 0; r < number; r += kRows) {
    const int size = number - r < kRows ? static_cast<int>(number - r) : kRows;
    Moments states[kRows];
    uint64_t hashes[kRows];
    bool fit = true;
    if (n % kUnit<T> == 0) {
      // First all sums, then all states: the long chains of operations that a state needs overlap.
      RowLanes<T> lanes;
      for (int k = 0; k < size; ++k) lanes.read(k, x + k * n, n);
      for (int k = 0; k < size; ++k) {
        double sum;
        hashes[k] = RowHash{lanes.hash[k]}.value();
        const Fit found = lanes.state(k, n, &sum, states[k]);
        if (found == Fit::kGood) continue;
        const auto pivot = static_cast<typename T::Scalar>(sum / static_cast<double>(n));
        if (found == Fit::kUnusable || !try_row<T>(x + k * n, n, pivot, states[k], hashes[k])) {
          states[k] = difficult_row<T>(x + k * n, n);
          fit = false;
        }
      }
    } else {
      for (int k = 0; k < size; ++k) {
        if (try_row<T>(x + k * n, n, 0, states[k], hashes[k])) continue;
        states[k] = difficult_row<T>(x + k * n, n);
        fit = false;
      }
    }
    for (int k = 0; k < size; ++k) out[r + k] = row_of(states[k], hashes[k]);
    const Moments both = merged(states, size, n);
    if (fit && is_finite(both.m2)) {
      all = merge(all, both);
    } else {
      for (int k = 0; k < size; ++k) all = merge(all, states[k]);
    }
    x += size * n;
  }
  return all;
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
