// The expected results of the C++ tests: decodes elements one by one from the definition of their
// dtype, and computes statistics in two passes of long double. Written to be obviously correct;
// shares no code with csrc.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/dtypes.h"
#include "../../csrc/moments.h"
#include "check.h"

namespace oracle {

using paramstats::DType;
using paramstats::Moments;
using Rng = std::mt19937_64;

constexpr uint64_t kSeed = 20240229;

// ---- elements ------------------------------------------------------------------------------

// Describes the six float dtypes. Their bias is 2^(exponent_bits - 1) - 1.
struct FloatFormat {
  int exponent_bits;
  int mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};

inline bool is_float(DType dtype) { return dtype <= DType::kFloat8E5M2; }

inline uint64_t sign_bit(DType dtype) { return uint64_t{1} << (8 * element_size(dtype) - 1); }

inline FloatFormat float_format(DType dtype) {
  constexpr FloatFormat kFormats[] = {{11, 52}, {8, 23}, {8, 7}, {5, 10}, {4, 3}, {5, 2}};
  return kFormats[static_cast<int>(dtype)];
}

inline double decode_float(DType dtype, uint64_t bits) {
  const FloatFormat f = float_format(dtype);
  const uint64_t all_ones = (uint64_t{1} << f.exponent_bits) - 1;
  const uint64_t mantissa = bits & ((uint64_t{1} << f.mantissa_bits) - 1);
  const uint64_t exponent = (bits >> f.mantissa_bits) & all_ones;
  const double sign = bits >> (f.mantissa_bits + f.exponent_bits) & 1 ? -1 : 1;
  if (dtype == DType::kFloat8E4M3FN) {  // all ones is NaN, all other patterns are numbers
    if (exponent == all_ones && mantissa == 7) return std::nan("");
  } else if (exponent == all_ones) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  const double whole = static_cast<double>(mantissa);
  if (exponent == 0) return sign * std::ldexp(whole, 1 - f.bias() - f.mantissa_bits);
  return sign * std::ldexp(whole + std::ldexp(1.0, f.mantissa_bits),
                           static_cast<int>(exponent) - f.bias() - f.mantissa_bits);
}

// The value of a bit pattern, as in a state's min and max. 64-bit integers are rounded to double.
inline double decode(DType dtype, uint64_t bits) {
  switch (dtype) {
    case DType::kInt8: return static_cast<int8_t>(bits);
    case DType::kUInt8: return static_cast<uint8_t>(bits);
    case DType::kBool: return static_cast<uint8_t>(bits) != 0;
    case DType::kInt16: return static_cast<int16_t>(bits);
    case DType::kUInt16: return static_cast<uint16_t>(bits);
    case DType::kInt32: return static_cast<int32_t>(bits);
    case DType::kUInt32: return static_cast<uint32_t>(bits);
    case DType::kInt64: return static_cast<double>(static_cast<int64_t>(bits));
    case DType::kUInt64: return static_cast<double>(bits);
    default: return decode_float(dtype, bits);
  }
}

// The bits of a random finite value. Integers have any value. Floats are zero (of either sign) with
// probability 1/16, otherwise their magnitude is between 1/8 and 2. Three quarters of them are
// positive, so that the mean is not near zero.
inline uint64_t random_bits(DType dtype, Rng& rng) {
  const uint64_t random = rng();
  if (!is_float(dtype)) return random;
  const FloatFormat f = float_format(dtype);
  const uint64_t eighth = static_cast<uint64_t>(f.bias() - 3) << f.mantissa_bits;
  const uint64_t magnitude = eighth + random % (uint64_t{4} << f.mantissa_bits);
  const uint64_t sign = (random >> 60) % 4 == 0;
  const bool zero = (rng() & 15) == 0;
  return sign << (f.exponent_bits + f.mantissa_bits) | (zero ? 0 : magnitude);
}

// ---- statistics -------------------------------------------------------------------------------

struct Truth {
  Moments exact;  // exact counts, min and max; mean and m2 are rounded from the fields below
  long double n = 0, mean = 0, m2 = 0, sum_sq = 0;  // of the finite elements
};

inline Truth truth_of(const std::vector<double>& x) {
  Truth t;
  long double sum = 0;
  for (double v : x) {
    ++t.exact.count;
    t.exact.zeros += v == 0;
    t.exact.nans += std::isnan(v);
    t.exact.pos_infs += std::isinf(v) && v > 0;
    t.exact.neg_infs += std::isinf(v) && v < 0;
    if (!std::isfinite(v)) continue;
    ++t.n;
    sum += v;
    t.sum_sq += static_cast<long double>(v) * v;
    t.exact.min = std::fmin(t.exact.min, v);
    t.exact.max = std::fmax(t.exact.max, v);
  }
  if (t.n == 0) return t;
  t.mean = t.exact.min == t.exact.max ? t.exact.min : sum / t.n;  // exact for a constant
  for (double v : x) {
    if (std::isfinite(v)) t.m2 += (v - t.mean) * (v - t.mean);
  }
  t.exact.mean = static_cast<double>(t.mean);
  t.exact.m2 = static_cast<double>(t.m2);
  return t;
}

// The largest allowed errors: of mean and rms relative to rms, of std relative to std.
struct Bounds {
  double mean, rms, std;
};
// docs/accuracy.md derives 7e-7, 9e-7 and 9e-7 for float32 lanes; these are the documented bounds.
constexpr Bounds kFloatLanes = {1e-6, 1e-6, 1e-5};
// With u = 2^-53 that derivation gives 1.4e-15; each of at most 130 merges adds up to 4u. The sums
// of the two-pass routine take up to 130 additions in a lane, which adds the same amount.
constexpr Bounds kDoubleLanes = {1e-13, 1e-13, 1e-13};

inline void check_counts(const Moments& got, const Moments& want) {
  CHECK(got.count, want.count);
  CHECK(got.zeros, want.zeros);
  CHECK(got.nans, want.nans);
  CHECK(got.pos_infs, want.pos_infs);
  CHECK(got.neg_infs, want.neg_infs);
  CHECK(got.min, want.min);
  CHECK(got.max, want.max);
}

inline void check_same(const Moments& got, const Moments& want) {
  check_counts(got, want);
  CHECK(got.mean, want.mean);
  CHECK(got.m2, want.m2);
}

inline void check_state(const Moments& got, const Truth& want, const Bounds& bounds) {
  check_counts(got, want.exact);
  if (want.n == 0) {
    CHECK(got.mean, 0);
    CHECK(got.m2, 0);
    return;
  }
  if (got.min == got.max) {  // a constant has no rounding
    CHECK(got.mean, want.exact.mean);
    CHECK(got.m2, 0);
  }
  const long double rms = sqrtl(want.sum_sq / want.n);
  const long double std = sqrtl(want.m2 / want.n);
  CHECK_NEAR(got.mean, want.mean, bounds.mean * rms);
  const paramstats::Statistics statistics = paramstats::finalize_finite(got, 0);
  CHECK_NEAR(statistics.rms, rms, bounds.rms * rms);
  CHECK_NEAR(statistics.norm, sqrtl(want.sum_sq), bounds.rms * sqrtl(want.sum_sq));
  CHECK_NEAR(sqrtl(got.m2 / want.n), std, bounds.std * std);
}

inline bool same_bits(const Moments& a, const Moments& b) {
  return std::memcmp(&a, &b, sizeof(Moments)) == 0;  // Moments has no padding
}

}  // namespace oracle
