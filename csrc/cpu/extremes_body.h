// Minimum, maximum and zeros while elements go by: a part of lanes_body.h, which includes it, once
// per SIMD level and under the same rules as kernels_body.h.

// Kept in lanes; `take` is given elements as they lie in memory, and converted.

// Of the converted elements.
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
  static bool is_nan() { return false; }  // the sums tell
  double least() const { return lanes_min(min); }
  double most() const { return lanes_max(max); }
};

// Of narrow floats as they lie in memory, several where a float32 has its place: a sign and a
// magnitude that grows with the number that it is. Unsigned, every negative pattern is larger than
// every positive one, and the larger the more negative; signed, the positive ones are larger.
template <class T, class Unsigned, class Signed>
struct SignMagnitude {
  static constexpr auto kMagnitude = static_cast<typename T::Storage>(~typename T::Storage{0}) >> 1;
  Unsigned most_bits = {}, least_bits = ~Unsigned{};
  Signed most_signed = (Signed)(Unsigned{} + static_cast<typename T::Storage>(kMagnitude + 1));
  Unsigned zeros = {};

  void take(const typename T::Storage* p, const typename T::Vector (&)[T::kVectors]) {
    Unsigned v;
    __builtin_memcpy(&v, p, sizeof(v));
    most_bits = v > most_bits ? v : most_bits;
    least_bits = v < least_bits ? v : least_bits;
    most_signed = (Signed)v > most_signed ? (Signed)v : most_signed;
    count_without(zeros, v, Unsigned{} + static_cast<typename T::Storage>(kMagnitude));
  }
  void join(const SignMagnitude& other) {
    most_bits = other.most_bits > most_bits ? other.most_bits : most_bits;
    least_bits = other.least_bits < least_bits ? other.least_bits : least_bits;
    most_signed = other.most_signed > most_signed ? other.most_signed : most_signed;
  }
  // Of a type whose conversion takes its NaN, the pattern of all ones, for a number.
  bool is_nan() const {
    if (!T::kNaNIsNumber) return false;
    const auto found =
        (Unsigned)(most_bits == static_cast<typename T::Storage>(-1)) |
        (Unsigned)((Unsigned)most_signed == static_cast<typename T::Storage>(kMagnitude));
    return lanes_any(found);
  }
  double least() const {
    const auto bits = lanes_max(most_bits);
    return T::value(bits > kMagnitude ? bits : lanes_min(least_bits));  // is any negative?
  }
  double most() const {
    const auto bits = lanes_max(most_signed);
    return T::value(bits >= 0 ? static_cast<typename T::Storage>(bits) : lanes_min(least_bits));
  }
};

// Of narrow integers as they lie in memory.
template <class T, class Lanes, class Unsigned>
struct Integers {
  Lanes min = Lanes{} + kMost, max = Lanes{} + kLeast;
  Unsigned zeros = {};
  static constexpr bool kSigned = static_cast<typename T::Storage>(-1) < 0;
  static constexpr int kBits = 8 * sizeof(typename T::Storage);
  static constexpr typename T::Storage kLeast = kSigned ? -(1 << (kBits - 1)) : 0;
  static constexpr typename T::Storage kMost = kSigned ? (1 << (kBits - 1)) - 1 : (1 << kBits) - 1;

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
  double least() const { return lanes_min(min); }
  double most() const { return lanes_max(max); }
};
