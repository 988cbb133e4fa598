// The extremes and the hash of rows. A part of kernels_body.h, which includes it once per SIMD
// level and states the rules for its code.
//
// The hash of a piece is NH (Black et al.: "UMAC: fast and secure message authentication", CRYPTO
// 1999) of its memory as 32-bit words w, padded to whole vectors, with the halves of each product
// mixed. (Products of words with other signs differ in their upper 33 bits only.)
//
//     sum over i of mix((w[2i] + key[2i] mod 2^32) * (w[2i+1] + key[2i+1] mod 2^32))    mod 2^64
//     mix(p) = p xor p / 2^32

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
    const UInt64Lanes product = times_halves((UInt64Lanes)(words + load_as<UInt32Lanes>(keys)));
    sums += product ^ product >> 32;
    keys += kLanes<UInt32Lanes>;
  }
  uint64_t value() const {
    uint64_t sum = 0;
    for (int l = 0; l < kLanes<UInt64Lanes>; ++l) sum += sums[l];
    return sum;
  }
};

// The extremes of a row (of narrow floats as the integers in memory), and what is computed of them
// while the row is summed. That is less for 16-bit floats: see NonzeroExtremes.
template <class T, class = typename T::Extremes>
struct OfRow {
  using Extremes = Converted<T>;
  using First = Extremes;
};
template <class T, class Unsigned, class Signed>
struct OfRow<T, SignMagnitude<T, Unsigned, Signed>> {
  using Extremes = SignMagnitude<T, Unsigned, Signed>;
  using First = Extremes;
};
template <class T>
struct OfRow<T, SignMagnitude<T, UInt16Lanes, Int16Lanes>> {
  using Extremes = SignMagnitude<T, UInt16Lanes, Int16Lanes>;
  using First = NonzeroExtremes<T>;
};

// The largest absolute values and the numbers of zeros, at most 255 in a lane.
template <class T>
inline typename T::Vector abs_max_of(const Converted<T>& e) {
  return larger(e.max, 0 - e.min);  // (-0 has a sign)
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

template <class T>
inline FloatLanes abs_max_of(const NonzeroExtremes<T>& e) {
  SignMagnitude<T, UInt16Lanes, Int16Lanes> all;
  e.add_to(all);
  return abs_max_of(all);
}
template <class T>
inline Int32Lanes zeros_of(const NonzeroExtremes<T>&) {
  return Int32Lanes{};
}

// Whether `first` is all that is needed of a group of rows. If so, adds it to `all`.
template <class E>
inline bool add_first(const E& first, E& all) {
  all.join(first);
  return true;
}
template <class T>
inline bool add_first(const NonzeroExtremes<T>& first,
                      SignMagnitude<T, UInt16Lanes, Int16Lanes>& all) {
  const bool has_both_signs = lanes_any(first.max_bits >> 15) && lanes_any(~first.max_signed >> 15);
  if (!has_both_signs || first.has_zero()) return false;
  first.add_to(all);
  return true;
}

// The last n % kUnit > 0 elements of a row, at the end of a unit: after other elements of the row
// (after the first one, if there are no others), and after zeros.
template <class T>
struct LastUnit {
  typename T::Storage repeated[kUnit<T>], padded[kUnit<T>] = {};

  LastUnit(const typename T::Storage* x, int64_t n) {
    constexpr int64_t kSize = sizeof(x[0]);
    const int64_t known = n < kUnit<T> ? n : kUnit<T>, rest = n % kUnit<T>;
    for (auto& element : repeated) element = element_at(x);
    __builtin_memcpy(repeated + kUnit<T> - known, x + n - known, known * kSize);
    __builtin_memcpy(padded + kUnit<T> - rest, x + n - rest, rest * kSize);
  }
};
template <class T, class E>
inline void take_last(const LastUnit<T>& last, E& e) {
  typename T::Vector v[T::kVectors];
  E counted = e;
  T::load(last.repeated, v);
  e.take(last.repeated, v);
  T::load(last.padded, v);
  counted.take(last.padded, v);
  e.zeros = counted.zeros;
}
template <class T>
inline void take_last(const LastUnit<T>& last, NonzeroExtremes<T>& e) {
  const typename T::Vector unused[T::kVectors] = {};
  e.take(0, last.repeated, unused);
}

// The extremes of a row, with zeros for the elements that the last unit lacks.
template <class T>
__attribute__((noinline)) typename OfRow<T>::Extremes extremes_of_row(const typename T::Storage* x,
                                                                      int64_t n) {
  typename OfRow<T>::Extremes e;
  typename T::Vector v[T::kVectors];
  int64_t i = 0;
  for (; i + kUnit<T> <= n; i += kUnit<T>) {
    T::load(x + i, v);
    e.take(x + i, v);
  }
  if (i < n) take_last<T>(LastUnit<T>(x, n), e);
  return e;
}

// What is computed of a row in addition to its sums.
template <class T>
struct ExtremesAndHash {
  typename OfRow<T>::First first = {};
  RowHash hash = {};

  __attribute__((always_inline)) void take(int unit, const typename T::Storage* p,
                                           const typename T::Vector (&v)[T::kVectors]) {
    hash.take(p);
    if constexpr (T::kHasNonzero) {
      first.take(unit, p, v);
    } else {
      first.take(p, v);
    }
  }
};
