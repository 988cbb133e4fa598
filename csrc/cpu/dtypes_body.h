// One struct per dtype: how to load vectors of it into lanes. A part of kernels_body.h, which
// includes it once per SIMD level and states the rules for its code.
//
// load(p, v) loads and converts the elements of kVectors vectors. Lane l of vector k is element
// element(k, l) in memory.

template <int n>
struct Vectors {
  static constexpr int kVectors = n;
  static constexpr bool kNaNIsNumber = false;
  static constexpr bool kHasNonzero = false;  // whether NonzeroExtremes can be used
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
  static constexpr bool kHasNonzero = true;
  static void load(const Storage* p, Vector (&v)[2]) {
    const auto pairs = load_as<UInt32Lanes>(p);
    v[0] = as_float(pairs << 16);
    v[1] = as_float(pairs & 0xffff0000u);
  }
  static double value(Storage bits) { return value_of<BFloat16>(bits); }
};

// For conversion alone: its vectors have the order of memory.
struct OrderedBFloat16 : InFloat, Vectors<1> {
  using Storage = uint16_t;
  static void load(const Storage* p, Vector (&v)[1]) {
    v[0] = as_float(load_converted<UInt32Lanes>(p) << 16);
  }
};

struct Float16 : InFloat, Vectors<2> {
  using Storage = uint16_t;
  using Extremes = SignMagnitude<Float16, UInt16Lanes, Int16Lanes>;
  static constexpr bool kHasNonzero = true;
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
