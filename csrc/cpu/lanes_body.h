// SIMD lanes and the operations on them. A part of kernels_body.h, which includes it once per SIMD
// level and states the rules for its code.

typedef float FloatLanes __attribute__((vector_size(kVectorBytes)));
typedef double DoubleLanes __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint64_t UInt64Lanes __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Lanes __attribute__((vector_size(kVectorBytes)));
typedef int16_t Int16Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint16_t UInt16Lanes __attribute__((vector_size(kVectorBytes)));
typedef int8_t Int8Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint8_t UInt8Lanes __attribute__((vector_size(kVectorBytes)));

typedef float HalfFloatLanes __attribute__((vector_size(kVectorBytes / 2)));

// Elementwise minimum, maximum and widening, as instructions where the level defines them.
// Compilers generate slower code for `v < m ? v : m`, to be right for NaN. (If an element is NaN,
// these results are not used.)
#if !defined(PARAMSTATS_MIN_PS)
inline FloatLanes smaller(FloatLanes v, FloatLanes m) { return v < m ? v : m; }
inline FloatLanes larger(FloatLanes v, FloatLanes m) { return v > m ? v : m; }
inline DoubleLanes smaller(DoubleLanes v, DoubleLanes m) { return v < m ? v : m; }
inline DoubleLanes larger(DoubleLanes v, DoubleLanes m) { return v > m ? v : m; }
template <int kHalf>
inline DoubleLanes doubles(FloatLanes v) {
  HalfFloatLanes halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[kHalf], DoubleLanes);
}
#else
inline FloatLanes smaller(FloatLanes v, FloatLanes m) { return PARAMSTATS_MIN_PS(v, m); }
inline FloatLanes larger(FloatLanes v, FloatLanes m) { return PARAMSTATS_MAX_PS(v, m); }
inline DoubleLanes smaller(DoubleLanes v, DoubleLanes m) { return PARAMSTATS_MIN_PD(v, m); }
inline DoubleLanes larger(DoubleLanes v, DoubleLanes m) { return PARAMSTATS_MAX_PD(v, m); }
template <int kHalf>
inline DoubleLanes doubles(FloatLanes v) {
  return kHalf == 0 ? PARAMSTATS_LOW_DOUBLES(v) : PARAMSTATS_HIGH_DOUBLES(v);
}
#endif
inline DoubleLanes widened(FloatLanes v) { return doubles<0>(v) + doubles<1>(v); }
inline DoubleLanes widened(DoubleLanes v) { return v; }

// Counts zeros in lanes.
#if defined(PARAMSTATS_COUNT_ZEROS_PS)
inline void count_zeros(Int32Lanes& count, FloatLanes v) { PARAMSTATS_COUNT_ZEROS_PS(count, v); }
inline void count_zeros(Int64Lanes& count, DoubleLanes v) { PARAMSTATS_COUNT_ZEROS_PD(count, v); }
#else
inline void count_zeros(Int32Lanes& count, FloatLanes v) { count -= (Int32Lanes)(v == 0); }
inline void count_zeros(Int64Lanes& count, DoubleLanes v) { count -= (Int64Lanes)(v == 0); }
#endif
// Counts the lanes in which no bit of `mask` is set.
template <class Lanes>
inline void count_without(Lanes& count, Lanes v, Lanes mask) {
#if defined(PARAMSTATS_COUNT_WITHOUT)
  if constexpr (sizeof(v[0]) == 1) {
    PARAMSTATS_COUNT_WITHOUT(epi8, count, v, mask);
  } else if constexpr (sizeof(v[0]) == 2) {
    PARAMSTATS_COUNT_WITHOUT(epi16, count, v, mask);
  } else {
    PARAMSTATS_COUNT_WITHOUT(epi32, count, v, mask);
  }
#else
  count -= (Lanes)((v & mask) == 0);
#endif
}

inline FloatLanes as_float(UInt32Lanes bits) { return (FloatLanes)bits; }

template <class V>
constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(V{}[0]));

template <class V>
inline int64_t lanes_sum(V v) {
  int64_t sum = 0;
  for (int l = 0; l < kLanes<V>; ++l) sum += v[l];
  return sum;
}
template <class V>
inline bool lanes_any(V v) {
  Int64Lanes words;
  __builtin_memcpy(&words, &v, sizeof(v));
  int64_t any = 0;
  for (int l = 0; l < kLanes<Int64Lanes>; ++l) any |= words[l];
  return any != 0;
}
inline double lanes_total(DoubleLanes v) {
  double halves[kLanes<DoubleLanes>];
  __builtin_memcpy(halves, &v, sizeof(v));
  for (int n = kLanes<DoubleLanes> / 2; n > 0; n /= 2) {
    for (int l = 0; l < n; ++l) halves[l] += halves[l + n];
  }
  return halves[0];
}

// The smallest or largest lane. Compares the halves of a wide vector before single lanes.
template <bool kMax, class S, int kBytes>
struct Extreme {
  typedef S Lanes __attribute__((vector_size(kBytes)));

  static S of(Lanes v) {
    if constexpr (kBytes > 16) {
      typedef Extreme<kMax, S, kBytes / 2> Half;
      typename Half::Lanes a[2];
      __builtin_memcpy(a, &v, sizeof(v));
      return Half::of(kMax ? (a[0] > a[1] ? a[0] : a[1]) : (a[0] < a[1] ? a[0] : a[1]));
    } else {
      S extreme = v[0];
      for (int l = 1; l < kLanes<Lanes>; ++l) {
        extreme = (kMax ? v[l] > extreme : v[l] < extreme) ? v[l] : extreme;
      }
      return extreme;
    }
  }
};
template <class S>
S copy_of(S);  // for decltype, which makes a reference of v[0]
template <class V>
inline auto lanes_min(V v) {
  return Extreme<false, decltype(copy_of(v[0])), sizeof(V)>::of(v);
}
template <class V>
inline auto lanes_max(V v) {
  return Extreme<true, decltype(copy_of(v[0])), sizeof(V)>::of(v);
}

// Operations for `reduced`.
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
#if defined(__clang__)
  V out;
  for (int l = 0; l < kLanes<V>; ++l) {
    const int from = ((l / kSize & ~1) + kOdd) * kSize + l % kSize;
    out[l] = l / kSize % 2 == 0 ? a[from] : b[from];
  }
  return out;
#else
  decltype(a == b) from;
  for (int l = 0; l < kLanes<V>; ++l) {
    from[l] = ((l / kSize & ~1) + kOdd) * kSize + l % kSize + l / kSize % 2 * kLanes<V>;
  }
  return __builtin_shuffle(a, b, from);
#endif
}

// Reduces as many vectors as V has lanes: lane l of the result is the reduction of v[l]. The order
// is that of lanes_total for each: the halves of a vector, then the halves of what they become.
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

// The arithmetic of a block: float32 lanes for dtypes that float32 represents exactly, float64
// lanes for the others. A sum of squares below kMinSquares may have lost digits to underflow: above
// it, kBlock roundings at the smallest step of float32, 2^-149, are less than 1e-7 of the sum.
// float64 has no wider dtype as a fallback, so it has no such bound. kInner is the number of
// elements that are added up in a lane before the sums of all vectors are added.
struct InFloat {
  static constexpr int kInner = cpu::kInner;
  using Scalar = float;
  using Vector = FloatLanes;
  using Mask = Int32Lanes;
  static constexpr int kWidth = kVectorBytes / 4;
  static constexpr double kMinSquares = 2.4e-34;
};
struct InDouble {
  static constexpr int kInner = 64;
  using Scalar = double;
  using Vector = DoubleLanes;
  using Mask = Int64Lanes;
  static constexpr int kWidth = kVectorBytes / 8;
  static constexpr double kMinSquares = 0;
};

// Loads a vector of any lanes from any address.
template <class V, class S>
inline V load_as(const S* p) {
  V lanes;
  __builtin_memcpy(&lanes, p, sizeof(lanes));
  return lanes;
}

// Loads as many elements as V has lanes and converts them.
template <class V, class S>
inline V load_converted(const S* p) {
  typedef S Narrow __attribute__((vector_size(sizeof(V) / sizeof(V{}[0]) * sizeof(S))));
  return __builtin_convertvector(load_as<Narrow>(p), V);
}
