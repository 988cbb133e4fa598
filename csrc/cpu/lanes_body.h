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
// float64 has no wider dtype as a fallback, so it has no such bound. kInner is the number of
// additions in a lane before the sums of all vectors are added.
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

#include "extremes_body.h"

// ---- one struct per dtype: how to load vectors of it ----------------------------------------
// load(p, v) loads and converts the elements of kVectors vectors. Lane l of vector k is element
// element(k, l) in memory.

template <int n>
struct Vectors {
  static constexpr int kVectors = n;
  static constexpr bool kNaNIsNumber = false;
  template <class S>
  static bool is_nan(S) {  // for dtypes whose NaN becomes a number in load
    return false;
  }
  // The elements of a group of n, which are as wide as one lane, are in the same lane.
  static constexpr int element(int k, int l) { return l * n + k; }
};
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of a group is in the low bits");

template <class T_, class L>
struct Native : L, Vectors<1> {  // dtypes that compilers convert
  using Storage = T_;
  using Extremes = Converted<Native>;
  static void load(const Storage* p, typename L::Vector (&v)[1]) {
    v[0] = load_converted<typename L::Vector>(p);
  }
};

// Integers of 16 bits. Wide is Int32Lanes or UInt32Lanes.
template <class T_, class Lanes, class Unsigned, class Wide>
struct Integer16 : InFloat, Vectors<2> {
  using Storage = T_;
  using Extremes = Integers<Integer16, Lanes, Unsigned>;
  static void load(const Storage* p, Vector (&v)[2]) {
    const Wide pairs = load_as<Wide>(p);
    v[0] = __builtin_convertvector((Int32Lanes)(pairs << 16 >> 16), Vector);
    v[1] = __builtin_convertvector((Int32Lanes)(pairs >> 16), Vector);
  }
};

template <class T_, class Lanes>
struct Integer32 : InDouble, Vectors<2> {
  using Storage = T_;
  using Extremes = Integers<Integer32, Lanes, UInt32Lanes>;
  static constexpr int element(int k, int l) { return k * kWidth + l; }
  static void load(const Storage* p, Vector (&v)[2]) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
#if defined(PARAMSTATS_LOAD_WORDS)
      v[k] = (Vector)PARAMSTATS_LOAD_WORDS(p, k);
#else
      // Compilers convert unsigned integers in many instructions.
      constexpr Storage kOffset = Extremes::kSigned ? 0 : Storage{1} << 31;
      typedef int32_t Half __attribute__((vector_size(kVectorBytes / 2)));
      v[k] = __builtin_convertvector(load_as<Half>(p + k * kWidth) ^ (int32_t)kOffset, Vector);
      if (kOffset != 0) v[k] += kOffset;
#endif
    }
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
  static void load(const Storage* p, Vector (&v)[2]) {
    const auto pairs = load_as<UInt32Lanes>(p);
    v[0] = as_float(pairs << 16);
    v[1] = as_float(pairs & 0xffff0000u);
  }
  static double value(Storage bits) { return value_of<BFloat16>(bits); }
};

struct Float16 : InFloat, Vectors<2> {
  using Storage = uint16_t;
  using Extremes = SignMagnitude<Float16, UInt16Lanes, Int16Lanes>;
#if defined(PARAMSTATS_LOAD_HALVES)
  static constexpr int element(int k, int l) { return k * kWidth + l; }
  static void load(const Storage* p, Vector (&v)[2]) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      v[k] = (Vector)PARAMSTATS_LOAD_HALVES(p, k);
#if defined(__x86_64__)
      // Hides the conversion from clang 14, which would compare the halves with zero element by
      // element.
      __asm__("" : "+v"(v[k]));
#endif
    }
  }
#else
  static void load(const Storage* p, Vector (&v)[2]) {
    const auto pairs = load_as<UInt32Lanes>(p);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const UInt32Lanes h = k == 0 ? pairs << 16 : pairs;  // in the upper half of each lane
      v[k] = widen(h & 0x80000000u, h >> 3 & 0x0fffe000u, 0x1p112f,
                   (UInt32Lanes)((h & 0x7c000000u) == 0x7c000000u));
    }
  }
#endif
  static double value(Storage bits) { return value_of<Float16>(bits); }
};

#if defined(PARAMSTATS_LOAD_HALVES)
// Loads four vectors of bytes that T::half(h) converts to float16. `h` has bytes in the upper half
// of 16-bit lanes; its lower half is T's to clear. (T::half is not a lambda, because GCC compiles
// lambdas for the base architecture.)
template <class T>
inline void load_bytes_as_halves(const uint8_t* p, FloatLanes (&v)[4]) {
  const auto pairs = load_as<UInt16Lanes>(p);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const UInt16Lanes h = T::half(k == 0 ? pairs << 8 : pairs);
    v[k] = (FloatLanes)PARAMSTATS_LOW_HALVES(h);
    v[k + 2] = (FloatLanes)PARAMSTATS_HIGH_HALVES(h);
  }
}
#endif

struct Float8 : InFloat, Vectors<4> {
  using Storage = uint8_t;
#if defined(PARAMSTATS_LOAD_HALVES)
  static constexpr int element(int k, int l) { return 2 * (k / 2 * kWidth + l) + k % 2; }
#endif
};

struct Float8E5M2 : Float8 {  // the upper half of a float16
  using Extremes = SignMagnitude<Float8E5M2, UInt8Lanes, Int8Lanes>;
  static void load(const Storage* p, Vector (&v)[4]) {
#if defined(PARAMSTATS_LOAD_HALVES)
    load_bytes_as_halves<Float8E5M2>(p, v);
#else
    const auto words = load_as<UInt32Lanes>(p);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const UInt32Lanes h = words << (24 - 8 * k);
      v[k] = widen(h & 0x80000000u, h >> 3 & 0x0fe00000u, 0x1p112f,
                   (UInt32Lanes)((h & 0x7c000000u) == 0x7c000000u));
    }
#endif
  }
  static UInt16Lanes half(UInt16Lanes h) { return h & 0xff00; }
  static double value(Storage bits) { return value_of<Float8E5M2>(bits); }
};

// Has no infinity. Its NaN (all ones) is loaded as 480: see kNaNIsNumber.
struct Float8E4M3FN : Float8 {
  using Extremes = SignMagnitude<Float8E4M3FN, UInt8Lanes, Int8Lanes>;
  static constexpr bool kNaNIsNumber = true;
  static bool is_nan(Storage bits) { return (bits & 0x7f) == 0x7f; }
  static void load(const Storage* p, Vector (&v)[4]) {
#if defined(PARAMSTATS_LOAD_HALVES)
    // Its exponent has one bit less than that of float16.
    load_bytes_as_halves<Float8E4M3FN>(p, v);
    for (auto& lanes : v) lanes *= 256.0f;
#else
    const auto words = load_as<UInt32Lanes>(p);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const UInt32Lanes h = words << (24 - 8 * k);
      v[k] = widen(h & 0x80000000u, h >> 4 & 0x07f00000u, 0x1p120f, UInt32Lanes{});
    }
#endif
  }
  static UInt16Lanes half(UInt16Lanes h) { return (UInt16Lanes)((Int16Lanes)h >> 1) & 0xbf80; }
  static double value(Storage bits) { return value_of<Float8E4M3FN>(bits); }
};
