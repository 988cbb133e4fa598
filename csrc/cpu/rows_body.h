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

inline FloatLanes magnitude(FloatLanes v) { return (FloatLanes)((Int32Lanes)v & 0x7fffffff); }
inline DoubleLanes magnitude(DoubleLanes v) {
  return (DoubleLanes)((Int64Lanes)v & 0x7fffffffffffffff);
}

// What block_sums computes of a piece in addition to the sums. (It fills the last vector with the
// first element. The hash includes these.)
template <class T>
struct RowExtremes {
  static_assert(kUnit<T> * sizeof(typename T::Storage) == kVectorBytes, "a unit is a vector");
  typename T::Vector max = {};
  typename T::Mask zeros = {};
  int64_t excluded_zeros = 0;
  RowHash hash = {};

  void take(int, const typename T::Storage* p, const typename T::Vector (&v)[T::kVectors]) {
    hash.take(p);
    for (int k = 0; k < T::kVectors; ++k) {
      max = larger(magnitude(v[k]), max);
      count_zeros(zeros, v[k]);
    }
  }
  void exclude(double value, int64_t n) { excluded_zeros += value == 0 ? n : 0; }
  void empty_lanes() {}  // no lane is narrower than 32 bits
  // The sums show a NaN, unless the conversion turned it into a number above the largest one.
  bool is_nan() const { return T::kNaNIsNumber && abs_max() > 448; }
  double abs_max() const { return lanes_max(max); }
  int64_t zero_count() const { return lanes_any(zeros) ? lanes_sum(zeros) - excluded_zeros : 0; }
};

// Reads a piece of n > 0 elements. Returns false, with the hash alone, if the lanes cannot
// represent it: it contains NaN or infinity, or d^2 overflows or underflows.
template <class T>
inline bool try_row(const typename T::Storage* x, int64_t n, RowState& out) {
  constexpr int kTries = 3;
  typename T::Scalar pivot = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    RowExtremes<T> extremes;
    const BlockSums s = block_sums<T>(x, n, pivot, extremes);
    out.hash = extremes.hash.value();
    Moments state;
    Fit fit;
    if (s.sum_sq == 0 && all_same<T>(x, n, extremes.zero_count())) {
      typename T::Storage first[kUnit<T>] = {element_at(x)};
      typename T::Vector v[T::kVectors];
      T::load(first, v);
      fit = Fit::kGood;
      state.mean = extremes.zero_count() == n ? 0 : v[0][0];
    } else {
      fit = from_sums({s.sum, s.sum_sq, -kInfinity, kInfinity, 0}, n, pivot, kMaxShiftShare,
                      T::kMinSquares, kLargest, state);
    }
    if (fit == Fit::kUnusable) return false;
    if (fit == Fit::kGood) {
      out.mean = state.mean;
      out.m2 = state.m2;
      out.abs_max = extremes.abs_max();
      out.zeros = extremes.zero_count();
      out.nonfinite = 0;
      return true;
    }
    pivot = static_cast<typename T::Scalar>(pivot + s.sum / static_cast<double>(n));
  }
  return false;
}

inline RowState row_of(const Moments& state) {
  RowState out;
  out.zeros = state.zeros;
  out.nonfinite = state.count - finite_count(state);
  if (out.nonfinite == state.count) return out;
  out.mean = state.mean;
  out.m2 = state.m2;
  out.abs_max = state.max > -state.min ? state.max : -state.min;
  return out;
}

// Reads n <= kPart elements that the lanes of their dtype cannot represent, as
// summarize_difficult_part does.
template <class T>
__attribute__((noinline)) void read_difficult_row(const typename T::Storage* x, int64_t n,
                                                  RowState& out) {
  const uint64_t hash = out.hash;
  double* const values = scratch();
  convert<T>(x, n, values);
  if (sizeof(typename T::Scalar) == 8 || !try_row<Native<double, InDouble>>(values, n, out)) {
    Moments state;
    update(state, values, n);
    out = row_of(state);
  }
  out.hash = hash;
}

template <class T>
void rows(const void* data, int64_t number, int64_t n, RowState* out) {
  const auto* x = static_cast<const typename T::Storage*>(data);
  for (int64_t r = 0; r < number; ++r, x += n) {
    if (!try_row<T>(x, n, out[r])) read_difficult_row<T>(x, n, out[r]);
  }
}

template <class S>
void rows_of_bytes(const void* data, int64_t number, int64_t n, RowState* out) {
  const auto* x = static_cast<const char*>(data);
  for (int64_t r = 0; r < number; ++r, x += n) {
    out[r] = row_of(chunk_of_bytes<S>(x, n));
    RowHash hash;
    int64_t i = 0;
    for (; i + kVectorBytes <= n; i += kVectorBytes) hash.take(x + i);
    char last[kVectorBytes] = {};
    __builtin_memcpy(last, x + i, n - i);
    hash.take(last);
    out[r].hash = hash.value();
  }
}
