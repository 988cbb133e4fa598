// Minimum, maximum and zero count in SIMD lanes. A part of kernels_body.h, which includes it once
// per SIMD level and states the rules for its code.
//
// `take(p, v)` adds elements: `p` points to them in memory, `v` contains them converted.

// The extremes of the converted elements.
template <class T>
struct Converted {
  typename T::Vector min = typename T::Vector{} + kInfinity;
  typename T::Vector max = typename T::Vector{} - kInfinity;
  typename T::Mask zeros = {};

  void take(const typename T::Storage*, const typename T::Vector (&v)[T::kVectors]) {
    for (int k = 0; k < T::kVectors; ++k) {
      min = smaller(v[k], min);
      max = larger(v[k], max);
      count_zeros(zeros, v[k]);
    }
  }
  void join(const Converted& other) {
    min = smaller(other.min, min);
    max = larger(other.max, max);
  }
  static bool is_nan() { return false; }  // the sums show a NaN
  double minimum() const { return lanes_min(min); }
  double maximum() const { return lanes_max(max); }
};

// The extremes of narrow floats, compared as the integers in memory: a vector then has two or four
// times as many of them as of float32. The bits are a sign and a magnitude that grows with the
// value. As unsigned integers, negative values compare larger than positive ones, and larger the
// more negative they are. As signed integers, positive values compare larger.
template <class T, class Unsigned, class Signed>
struct SignMagnitude {
  static constexpr auto kMagnitude = static_cast<typename T::Storage>(~typename T::Storage{0}) >> 1;
  Unsigned max_bits = {}, min_bits = ~Unsigned{};
  Signed max_signed = (Signed)(Unsigned{} + static_cast<typename T::Storage>(kMagnitude + 1));
  Unsigned zeros = {};

  void take(const typename T::Storage* p, const typename T::Vector (&)[T::kVectors]) {
    Unsigned v;
    __builtin_memcpy(&v, p, sizeof(v));
    max_bits = v > max_bits ? v : max_bits;
    min_bits = v < min_bits ? v : min_bits;
    max_signed = (Signed)v > max_signed ? (Signed)v : max_signed;
    count_without(zeros, v, Unsigned{} + static_cast<typename T::Storage>(kMagnitude));
  }
  // Zeros count as positive or negative.
  bool has_both_signs() const {
    return lanes_max(max_bits) > kMagnitude && lanes_max(max_signed) >= 0;
  }
  void join(const SignMagnitude& other) {
    max_bits = other.max_bits > max_bits ? other.max_bits : max_bits;
    min_bits = other.min_bits < min_bits ? other.min_bits : min_bits;
    max_signed = other.max_signed > max_signed ? other.max_signed : max_signed;
  }
  // Whether there is a NaN, for a dtype whose conversion turns NaN (all ones) into a number.
  bool is_nan() const {
    if (!T::kNaNIsNumber) return false;
    const auto found =
        (Unsigned)(max_bits == static_cast<typename T::Storage>(-1)) |
        (Unsigned)((Unsigned)max_signed == static_cast<typename T::Storage>(kMagnitude));
    return lanes_any(found);
  }
  double minimum() const {
    const auto bits = lanes_max(max_bits);
    return T::value(bits > kMagnitude ? bits : lanes_min(min_bits));  // is any negative?
  }
  double maximum() const {
    const auto bits = lanes_max(max_signed);
    return T::value(bits >= 0 ? static_cast<typename T::Storage>(bits) : lanes_min(min_bits));
  }
};

// The extremes of a block of 16-bit floats without zeros, in three instructions instead of six.
// Needs no minimum of its own if both signs occurred before: the most negative element is the
// largest unsigned integer. In v - 1, which replaces v, a zero of either sign is the largest
// integer, unsigned or signed. So the maxima show whether there is one.
template <class T>
struct NonzeroExtremes {
  UInt16Lanes max_bits = {};  // of v - 1, as below
  Int16Lanes max_signed = (Int16Lanes)(UInt16Lanes{} + 0x8000);

  void take(int, const uint16_t* p, const typename T::Vector (&)[T::kVectors]) {
    const UInt16Lanes v = load_as<UInt16Lanes>(p) - 1;
    max_bits = v > max_bits ? v : max_bits;
    max_signed = (Int16Lanes)v > max_signed ? (Int16Lanes)v : max_signed;
  }
  void join(const NonzeroExtremes& other) {
    max_bits = other.max_bits > max_bits ? other.max_bits : max_bits;
    max_signed = other.max_signed > max_signed ? other.max_signed : max_signed;
  }
  static void exclude(double, int64_t) {}
  static bool is_nan() { return false; }  // the sums show a NaN
  bool has_zero() const {
    return lanes_any((UInt16Lanes)(max_bits == 0xffff) | (UInt16Lanes)(max_signed == 0x7fff));
  }
  void add_to(SignMagnitude<T, UInt16Lanes, Int16Lanes>& all) const {
    const UInt16Lanes bits = max_bits + 1;
    const auto signed_bits = (Int16Lanes)((UInt16Lanes)max_signed + 1);
    all.max_bits = bits > all.max_bits ? bits : all.max_bits;
    all.max_signed = signed_bits > all.max_signed ? signed_bits : all.max_signed;
  }
};

// The extremes of integers, compared as they are in memory.
template <class T, class Lanes, class Unsigned>
struct Integers {
  Lanes min = Lanes{} + kMaxValue, max = Lanes{} + kMinValue;
  Unsigned zeros = {};
  static constexpr bool kSigned = static_cast<typename T::Storage>(-1) < 0;
  static constexpr int kBits = 8 * sizeof(typename T::Storage);
  static constexpr typename T::Storage kMinValue = kSigned ? -(int64_t{1} << (kBits - 1)) : 0;
  static constexpr typename T::Storage kMaxValue = (int64_t{1} << (kBits - kSigned)) - 1;

  void take(const typename T::Storage* p, const typename T::Vector (&)[T::kVectors]) {
    Lanes v;
    __builtin_memcpy(&v, p, sizeof(v));
    min = v < min ? v : min;
    max = v > max ? v : max;
    count_without(zeros, (Unsigned)v, ~Unsigned{});
  }
  void join(const Integers& other) {
    min = other.min < min ? other.min : min;
    max = other.max > max ? other.max : max;
  }
  static bool is_nan() { return false; }
  double minimum() const { return lanes_min(min); }
  double maximum() const { return lanes_max(max); }
};
