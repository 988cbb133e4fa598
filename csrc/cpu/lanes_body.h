// SIMD lanes, and how each dtype is loaded into them. A part of kernels_body.h, which includes it
// once per SIMD level and states the rules for its code.

// ---- lanes ----------------------------------------------------------------------------------

typedef float FloatLanes __attribute__((vector_size(kVectorBytes)));
typedef double DoubleLanes __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Lanes __attribute__((vector_size(kVectorBytes)));
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
inline DoubleLanes widened(FloatLanes v) {
  HalfFloatLanes halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], DoubleLanes) +
         __builtin_convertvector(halves[1], DoubleLanes);
}
#else
inline FloatLanes smaller(FloatLanes v, FloatLanes m) { return PARAMSTATS_MIN_PS(v, m); }
inline FloatLanes larger(FloatLanes v, FloatLanes m) { return PARAMSTATS_MAX_PS(v, m); }
inline DoubleLanes smaller(DoubleLanes v, DoubleLanes m) { return PARAMSTATS_MIN_PD(v, m); }
inline DoubleLanes larger(DoubleLanes v, DoubleLanes m) { return PARAMSTATS_MAX_PD(v, m); }
inline DoubleLanes widened(FloatLanes v) { return PARAMSTATS_WIDENED(v); }
#endif
inline DoubleLanes widened(DoubleLanes v) { return v; }

// Squares float32 in float32, as everywhere, so that an overflow shows.
template <class V>
inline DoubleLanes widened_squares(V d) {
  return widened(d * d);
}

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
#if defined(PARAMSTATS_COUNT_WITHOUT_EPI8)
  if constexpr (sizeof(v[0]) == 1) {
    PARAMSTATS_COUNT_WITHOUT_EPI8(count, v, mask);
  } else {
    PARAMSTATS_COUNT_WITHOUT_EPI16(count, v, mask);
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
template <class V>
inline auto lanes_min(V v) {
  auto min = v[0];
  for (int l = 1; l < kLanes<V>; ++l) min = v[l] < min ? v[l] : min;
  return min;
}
template <class V>
inline auto lanes_max(V v) {
  auto max = v[0];
  for (int l = 1; l < kLanes<V>; ++l) max = v[l] > max ? v[l] : max;
  return max;
}

// The arithmetic of a block: float32 lanes for dtypes that float32 represents exactly, float64
// lanes for the others. A sum of squares below kMinSquares may have lost digits to underflow: above
// it, kBlock roundings at the smallest step of float32, 2^-149, are less than 1e-7 of the sum.
// float64 has no wider dtype as a fallback, so it has no such bound.
struct InFloat {
  using Scalar = float;
  using Vector = FloatLanes;
  using Mask = Int32Lanes;
  static constexpr int kWidth = kVectorBytes / 4;
  static constexpr double kMinSquares = 2.4e-34;
};
struct InDouble {
  using Scalar = double;
  using Vector = DoubleLanes;
  using Mask = Int64Lanes;
  static constexpr int kWidth = kVectorBytes / 8;
  static constexpr double kMinSquares = 0;
};

// Loads as many elements as V has lanes and converts them.
template <class V, class S>
inline V load_converted(const S* p) {
  typedef S Narrow __attribute__((vector_size(sizeof(V) / sizeof(V{}[0]) * sizeof(S))));
  Narrow narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, V);
}

// Loads narrow integers and extends them to 32 bits. With instructions where the level defines
// them: GCC converts element by element otherwise.
#if defined(PARAMSTATS_EXTEND)
inline Int32Lanes extend(const int8_t* p) { return (Int32Lanes)PARAMSTATS_EXTEND(epi8, p); }
inline Int32Lanes extend(const uint8_t* p) { return (Int32Lanes)PARAMSTATS_EXTEND(epu8, p); }
inline Int32Lanes extend(const int16_t* p) { return (Int32Lanes)PARAMSTATS_EXTEND(epi16, p); }
inline Int32Lanes extend(const uint16_t* p) { return (Int32Lanes)PARAMSTATS_EXTEND(epu16, p); }
#else
template <class S>
inline Int32Lanes extend(const S* p) {
  return load_converted<Int32Lanes>(p);
}
#endif

#include "extremes_body.h"

// ---- one struct per dtype: how to load vectors of it ----------------------------------------
// load(p, v) loads and converts the elements of kVectors vectors. Lane l of vector k is element
// k * kWidth + l, or element l * kVectors + k if kInterleaved.

template <int n>
struct Vectors {
  static constexpr int kVectors = n;
  static constexpr bool kInterleaved = false;
  static constexpr bool kNaNIsNumber = false;
  template <class S>
  static bool is_nan(S) {  // for dtypes whose NaN becomes a number in load
    return false;
  }
};

template <class T_, class L>
struct Native : L, Vectors<1> {  // dtypes that compilers convert
  using Storage = T_;
  using Extremes = Converted<Native>;
  static void load(const Storage* p, typename L::Vector (&v)[1]) {
    v[0] = load_converted<typename L::Vector>(p);
  }
};

template <class T_, class Lanes, class Unsigned>
struct NarrowInteger : InFloat, Vectors<sizeof(float) / sizeof(T_)> {
  using Storage = T_;
  using Extremes = Integers<NarrowInteger, Lanes, Unsigned>;
  static void load(const Storage* p, Vector (&v)[NarrowInteger::kVectors]) {
#pragma GCC unroll 4
    for (int k = 0; k < NarrowInteger::kVectors; ++k, p += kWidth) {
      v[k] = __builtin_convertvector(extend(p), Vector);
    }
  }
};

struct Bool : InFloat, Vectors<1> {
  using Storage = uint8_t;
  using Extremes = Converted<Bool>;
  static void load(const Storage* p, Vector (&v)[1]) {
    v[0] = __builtin_convertvector((extend(p) != 0) & 1, Vector);
  }
};

// Converts narrow floats to float32. Their magnitude bits, shifted to the position in float32, are
// the value times a power of two, also for subnormals; `special` marks infinity and NaN.
inline FloatLanes widen(UInt32Lanes sign, UInt32Lanes magnitude, float scale, UInt32Lanes special) {
  const FloatLanes value = as_float(magnitude) * scale;
  return as_float((UInt32Lanes)value | sign | (special & (magnitude | 0x7f800000u)));
}

// The value of one narrow float, computed by `load` as for many.
template <class T>
inline double value_of(typename T::Storage bits) {
  typename T::Storage all[T::kVectors * T::kWidth] = {bits};
  typename T::Vector v[T::kVectors];
  T::load(all, v);
  return v[0][0];
}

struct BFloat16 : InFloat, Vectors<2> {
  using Storage = uint16_t;
  using Extremes = SignMagnitude<BFloat16, UInt16Lanes, Int16Lanes>;
  static constexpr bool kInterleaved = true;
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first element is the low half");
  static void load(const Storage* p, Vector (&v)[2]) {
    UInt32Lanes pairs;
    __builtin_memcpy(&pairs, p, sizeof(pairs));
    v[0] = as_float(pairs << 16);
    v[1] = as_float(pairs & 0xffff0000u);
  }
  static double value(Storage bits) { return value_of<BFloat16>(bits); }
};

struct Float16 : InFloat, Vectors<2> {
  using Storage = uint16_t;
  using Extremes = SignMagnitude<Float16, UInt16Lanes, Int16Lanes>;
  static void load(const Storage* p, Vector (&v)[2]) {
    for (int k = 0; k < 2; ++k, p += kWidth) {
#if defined(PARAMSTATS_LOAD_HALF)
      v[k] = (Vector)PARAMSTATS_LOAD_HALF(p);
      // Hides the conversion from clang 14, which would compare the halves with zero element by
      // element.
      __asm__("" : "+v"(v[k]));
#else
      const UInt32Lanes h = (UInt32Lanes)extend(p);
      v[k] = widen((h & 0x8000u) << 16, (h & 0x7fffu) << 13, 0x1p112f,
                   (UInt32Lanes)((h & 0x7c00u) == 0x7c00u));
#endif
    }
  }
  static double value(Storage bits) { return value_of<Float16>(bits); }
};

#if defined(PARAMSTATS_BYTES_AS_HALVES)
// Loads four vectors of bytes: T::half(h) converts bytes in 16-bit lanes to float16 bits. (T::half
// is not a lambda, because GCC compiles lambdas for the base architecture.)
template <class T>
inline void load_bytes_as_halves(const uint8_t* p, FloatLanes (&v)[4]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, p += kVectorBytes / 2) {
    const UInt16Lanes h = T::half((UInt16Lanes)PARAMSTATS_BYTES_AS_HALVES(p));
    v[2 * half] = (FloatLanes)PARAMSTATS_LOW_HALVES(h);
    v[2 * half + 1] = (FloatLanes)PARAMSTATS_HIGH_HALVES(h);
  }
}
#endif

struct Float8E5M2 : InFloat, Vectors<4> {  // the upper half of a float16
  using Storage = uint8_t;
  using Extremes = SignMagnitude<Float8E5M2, UInt8Lanes, Int8Lanes>;
  static void load(const Storage* p, Vector (&v)[4]) {
#if defined(PARAMSTATS_BYTES_AS_HALVES)
    load_bytes_as_halves<Float8E5M2>(p, v);
#else
    for (int k = 0; k < 4; ++k, p += kWidth) {
      const UInt32Lanes h = (UInt32Lanes)extend(p);
      v[k] = widen((h & 0x80u) << 24, (h & 0x7fu) << 21, 0x1p112f,
                   (UInt32Lanes)((h & 0x7cu) == 0x7cu));
    }
#endif
  }
  static UInt16Lanes half(UInt16Lanes h) { return h << 8; }
  static double value(Storage bits) { return value_of<Float8E5M2>(bits); }
};

// Has no infinity. Its NaN (all ones) is loaded as 480: see kNaNIsNumber.
struct Float8E4M3FN : InFloat, Vectors<4> {
  using Storage = uint8_t;
  using Extremes = SignMagnitude<Float8E4M3FN, UInt8Lanes, Int8Lanes>;
  static constexpr bool kNaNIsNumber = true;
  static bool is_nan(Storage bits) { return (bits & 0x7f) == 0x7f; }
  static void load(const Storage* p, Vector (&v)[4]) {
#if defined(PARAMSTATS_BYTES_AS_HALVES)
    // Its exponent has one bit less than that of float16.
    load_bytes_as_halves<Float8E4M3FN>(p, v);
    for (auto& lanes : v) lanes *= 256.0f;
#else
    for (int k = 0; k < 4; ++k, p += kWidth) {
      const UInt32Lanes h = (UInt32Lanes)extend(p);
      v[k] = widen((h & 0x80u) << 24, (h & 0x7fu) << 20, 0x1p120f, UInt32Lanes{});
    }
#endif
  }
  static UInt16Lanes half(UInt16Lanes h) { return (h << 8 & 0x8000) | (h << 7 & 0x3f80); }
  static double value(Storage bits) { return value_of<Float8E4M3FN>(bits); }
};
