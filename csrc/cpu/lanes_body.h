// SIMD lanes, and how to read each element type into them: the first part of kernels_body.h, which
// includes it, once per SIMD level and under the same rules.

// ---- lanes ----------------------------------------------------------------------------------

typedef float FloatLanes __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Lanes __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Lanes __attribute__((vector_size(kVectorBytes)));
typedef double DoubleLanes __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Lanes __attribute__((vector_size(kVectorBytes)));

typedef float HalfFloatLanes __attribute__((vector_size(kVectorBytes / 2)));

// The arithmetic of a block: float32 for what float32 holds exactly, float64 for the rest. A sum of
// squares outside [kLeastSquares, kMostSquares] may have lost digits to under- or overflow: the
// lower bound makes kBlock roundings at float32's smallest step, 2^-149, less than 1e-7 of the sum.
// float64 has nothing wider to turn to, so it has no lower bound.
struct InFloat {
  using Scalar = float;
  using Vector = FloatLanes;
  using Mask = Int32Lanes;
  static constexpr int kWidth = kVectorBytes / 4;
  static constexpr double kLeastSquares = 1.5e-35;
  static constexpr double kMostSquares = 3.4028234663852886e38;
  static DoubleLanes widened(Vector v) {
    HalfFloatLanes halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    return __builtin_convertvector(halves[0], DoubleLanes) +
           __builtin_convertvector(halves[1], DoubleLanes);
  }
};
struct InDouble {
  using Scalar = double;
  using Vector = DoubleLanes;
  using Mask = Int64Lanes;
  static constexpr int kWidth = kVectorBytes / 8;
  static constexpr double kLeastSquares = 0;
  static constexpr double kMostSquares = 1.7976931348623157e308;
  static DoubleLanes widened(Vector v) { return v; }
};

// Reads as many elements as V has lanes and converts them.
template <class V, class S>
inline V load_converted(const S* p) {
  typedef S Narrow __attribute__((vector_size(sizeof(V) / sizeof(V{}[0]) * sizeof(S))));
  Narrow narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, V);
}

// The same from narrow integers to 32 bits, which GCC makes element by element unless it is told
// the instruction.
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

inline FloatLanes as_float(UInt32Lanes bits) {
  FloatLanes out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

// ---- one struct per element type: how to read a vector of it -----------------------------------

template <class T, class L>
struct Native : L {  // what converts to its lanes as it is
  using Storage = T;
  static typename L::Vector load(const T* p) { return load_converted<typename L::Vector>(p); }
};

template <class T>
struct NarrowInteger : InFloat {
  using Storage = T;
  static Vector load(const T* p) { return __builtin_convertvector(extend(p), Vector); }
};

struct Bool : InFloat {
  using Storage = uint8_t;
  static Vector load(const Storage* p) {
    return __builtin_convertvector((extend(p) != 0) & 1, Vector);
  }
};

struct BFloat16 : InFloat {
  using Storage = uint16_t;
  static Vector load(const Storage* p) { return as_float((UInt32Lanes)extend(p) << 16); }
};

// A narrow float's magnitude, moved up against float32's mantissa, reads as its value times a power
// of two, subnormals included; `special` marks infinity and NaN, whose exponent is all ones.
inline FloatLanes widen(UInt32Lanes sign, UInt32Lanes magnitude, float scale, UInt32Lanes special) {
  UInt32Lanes bits;
  const FloatLanes value = as_float(magnitude) * scale;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return as_float(bits | sign | (special & (magnitude | 0x7f800000u)));
}

struct Float16 : InFloat {
  using Storage = uint16_t;
  static Vector load(const Storage* p) {
#if defined(PARAMSTATS_LOAD_HALF)
    Vector v = (Vector)PARAMSTATS_LOAD_HALF(p);
    // clang 14 would compare the halves with zero instead, element by element: hide where v is
    // from.
    __asm__("" : "+v"(v));
    return v;
#else
    const UInt32Lanes h = (UInt32Lanes)extend(p);
    return widen((h & 0x8000u) << 16, (h & 0x7fffu) << 13, 0x1p112f,
                 (UInt32Lanes)((h & 0x7c00u) == 0x7c00u));
#endif
  }
};

struct Float8E5M2 : InFloat {
  using Storage = uint8_t;
  static Vector load(const Storage* p) {
    const UInt32Lanes h = (UInt32Lanes)extend(p);
    return widen((h & 0x80u) << 24, (h & 0x7fu) << 21, 0x1p112f,
                 (UInt32Lanes)((h & 0x7cu) == 0x7cu));
  }
};

struct Float8E4M3FN : InFloat {  // no infinity; NaN is the one pattern of all ones
  using Storage = uint8_t;
  static Vector load(const Storage* p) {
    const UInt32Lanes h = (UInt32Lanes)extend(p);
    return widen((h & 0x80u) << 24, (h & 0x7fu) << 20, 0x1p120f,
                 (UInt32Lanes)((h & 0x7fu) == 0x7fu));
  }
};
