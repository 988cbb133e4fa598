// Tests of the distributions by the CPU backend at every SIMD level that this CPU supports, against
// plain loops: integers for counts, long double for moments.
//
//     g++ -std=c++17 -O2 -pthread tests/cpp/test_distribution.cpp csrc/cpu/*.cpp -o
//     build/test_distribution
#include <cfloat>
#include <climits>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/details.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"

namespace paramstats::test {
namespace {

using cpu::available_kernels;
using cpu::ChunkDistribution;
using cpu::kChunk;
using cpu::Kernels;
using cpu::kPart;
using LongDouble = long double;

// An element without rounding, also of 64-bit integers.
LongDouble exact(DType dtype, uint64_t bits) {
  if (dtype == DType::kInt64) return static_cast<LongDouble>(static_cast<int64_t>(bits));
  if (dtype == DType::kUInt64) return static_cast<LongDouble>(bits);
  return oracle::decode(dtype, bits);
}

std::vector<LongDouble> exact_values(const Tensor& t) {
  std::vector<LongDouble> out;
  for (int64_t i = 0; i < t.numel(); ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, t.data() + i * element_size(t.dtype), element_size(t.dtype));
    out.push_back(exact(t.dtype, bits));
  }
  return out;
}

struct Expected {
  std::vector<int64_t> counts;
  MxCounts mx[kMxFormats];
  LongDouble n = 0, mean = 0, m2 = 0, m3 = 0, m4 = 0, abs_mean = 0;
};

Expected expected_of(const Tensor& t) {
  const auto x = exact_values(t);
  const ExponentRange range = exponents_of(t.dtype);
  Expected e;
  e.counts.assign(2 * range.bins, 0);
  LongDouble first = 0;
  bool constant = true;
  for (LongDouble v : x) {
    if (!std::isfinite(v)) continue;
    if (e.n == 0) first = v;
    constant = constant && v == first;
    ++e.n;
    e.mean += v;
    e.abs_mean += std::fabs(v);
    if (v != 0) ++e.counts[(v < 0 ? 0 : range.bins) + std::ilogb(v) - range.first];
  }
  if (e.n > 0) e.mean /= e.n, e.abs_mean /= e.n;
  if (e.n > 0 && constant) e.mean = first;
  for (LongDouble v : x) {
    if (!std::isfinite(v)) continue;
    const LongDouble d = v - e.mean;
    e.m2 += d * d, e.m3 += d * d * d, e.m4 += d * d * d * d;
  }
  const LongDouble half_subnormal[] = {0.25L, std::ldexp(1.0L, -10), std::ldexp(1.0L, -17)};
  const auto saturates = [](int format, LongDouble y) {
    return format == 0 ? y >= 7 : format == 1 ? y > 464 : y >= 61440;
  };
  for (size_t begin = 0; begin < x.size(); begin += 32) {
    const size_t end = std::min(x.size(), begin + 32);
    LongDouble largest = 0;
    for (size_t i = begin; i < end; ++i) {
      if (std::isfinite(x[i])) largest = std::max(largest, std::fabs(x[i]));
    }
    if (largest == 0) continue;
    for (size_t i = begin; i < end; ++i) {
      if (!std::isfinite(x[i]) || x[i] == 0) continue;
      for (int f = 0; f < kMxFormats; ++f) {
        const int emax[] = {2, 8, 15};
        const LongDouble y = std::ldexp(std::fabs(x[i]), emax[f] - std::ilogb(largest));
        e.mx[f].underflow += y <= half_subnormal[f];
        e.mx[f].overflow += saturates(f, y);
      }
    }
  }
  return e;
}

// The documented bound is 1e-5 for float32 lanes.
constexpr LongDouble kBound = 1e-5L;

void check_distribution(const std::string& name, const Tensor& t) {
  const Expected want = expected_of(t);
  const ExponentRange range = exponents_of(t.dtype);
  const oracle::Truth truth = oracle::truth_of(t.values());
  for (const Kernels* kernels : available_kernels()) {
    check::at(std::string(kernels->name) + " " + name_of(t.dtype) + " " + name + " " +
              std::to_string(t.numel()));
    std::vector<int64_t> counts(2 * range.bins);
    ChunkDistribution got{{}, {}, counts.data()};
    Moments state;
    for (int64_t i = 0; i < t.numel(); i += kChunk) {
      state = merge(
          state, kernels->distribution[static_cast<int>(t.dtype)](
                     t.data() + i * element_size(t.dtype), std::min(kChunk, t.numel() - i), got));
    }
    const LongDouble rms = want.n > 0 ? std::sqrt(truth.sum_sq / want.n) : 0;
    if (rms > 1e150L || (rms > 0 && rms < 1e-150L)) {  // squares beyond the range of float64
      oracle::check_counts(state, truth.exact);
    } else {
      oracle::check_state(state, truth, bounds(t.dtype));
    }
    for (size_t k = 0; k < counts.size(); ++k) CHECK(counts[k], want.counts[k]);
    for (int f = 0; f < kMxFormats; ++f) {
      CHECK(got.mx[f].underflow, want.mx[f].underflow);
      CHECK(got.mx[f].overflow, want.mx[f].overflow);
    }
    const HigherMoments& m = got.moments;
    CHECK(static_cast<LongDouble>(m.n), want.n);
    if (want.n == 0) continue;
    const LongDouble smallest = DBL_TRUE_MIN;
    CHECK_NEAR(m.abs_mean, want.abs_mean, 1e-6L * want.abs_mean + smallest);
    const LongDouble std = std::sqrt(want.m2 / want.n);
    CHECK_NEAR(m.mean, want.mean, 1e-6L * std + DBL_EPSILON * std::fabs(want.mean) + smallest);
    if (want.m2 == 0) {
      CHECK(m.m2, 0);
      CHECK(m.m3, 0);
      CHECK(m.m4, 0);
    }
    // Fourth powers beyond the range of float64 have no meaning.
    if (want.m2 == 0 || std > 1e70L || std < 1e-70L) continue;
    CHECK_NEAR(m.m2, want.m2, 3e-6L * want.m2);
    const LongDouble skewness = want.m3 / (want.n * std * std * std);
    const LongDouble kurtosis = want.m4 * want.n / (want.m2 * want.m2);
    const LongDouble got_std = std::sqrt(static_cast<LongDouble>(m.m2) / want.n);
    CHECK_NEAR(m.m3 / (want.n * got_std * got_std * got_std), skewness,
               kBound * std::max(1.0L, std::sqrt(kurtosis)));
    CHECK_NEAR(m.m4 * want.n / (static_cast<LongDouble>(m.m2) * m.m2), kurtosis, kBound * kurtosis);
  }
}

// ---- data ----------------------------------------------------------------------------------

// The float of `dtype` nearest to `value`, by rounding the float32 or float64 towards zero.
uint64_t truncated(DType dtype, double value) {
  if (dtype == DType::kFloat64) return bits_of(value);
  const float single = static_cast<float>(value);
  if (dtype == DType::kFloat32) return bits_of(single);
  if (dtype == DType::kBFloat16) return bits_of(single) >> 16;
  const oracle::FloatFormat f = oracle::float_format(dtype);
  const uint64_t sign = std::signbit(value) ? oracle::sign_bit(dtype) : 0;
  const double size = std::fabs(value);
  const int lowest = 1 - f.bias();
  const int exponent = size == 0 ? lowest : std::max(lowest, std::ilogb(size));
  const auto digits = static_cast<uint64_t>(std::ldexp(size, f.mantissa_bits - exponent));
  const uint64_t biased = static_cast<uint64_t>(int64_t{exponent} - lowest);
  return sign | ((biased << f.mantissa_bits) + digits);
}

std::vector<DType> float_dtypes() {
  return {DType::kFloat64, DType::kFloat32,      DType::kBFloat16,
          DType::kFloat16, DType::kFloat8E4M3FN, DType::kFloat8E5M2};
}

uint64_t any_bits(DType dtype) {
  const uint64_t random = rng();
  return element_size(dtype) == 8 ? random
                                  : random & ((uint64_t{1} << (8 * element_size(dtype))) - 1);
}

// ---- tests ---------------------------------------------------------------------------------

void every_size_up_to_200_and_around_parts() {
  for (DType dtype : all_dtypes()) {
    std::vector<int64_t> sizes;
    for (int64_t n = 0; n <= 200; ++n) sizes.push_back(n);
    for (int64_t n : {kPart, 2 * kPart, 3 * kPart}) {
      for (int64_t d : {-33, -1, 0, 1, 31, 32, 33}) sizes.push_back(n + d);
    }
    for (int64_t n : sizes) check_distribution("random", Tensor(dtype, n, n % 3));
  }
}

void any_bits_of_all_dtypes() {  // NaN, infinity, subnormals, the largest integers
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {int64_t{31}, int64_t{100}, 2 * kPart + 70}) {
      Tensor t(dtype, n);
      t.fill([=](int64_t) { return any_bits(dtype); });
      check_distribution("any bits", t);
      t.fill([=](int64_t i) {
        return i % 97 == 5 ? any_bits(dtype) : oracle::random_bits(dtype, rng);
      });
      check_distribution("some any bits", t);
    }
  }
}

void normal_data_of_all_scales() {
  for (DType dtype : float_dtypes()) {
    for (int exponent : {-1060, -500, -200, -148, -130, -126, -110, -100, -95, -90, -60, -10,
                         -3,    0,    3,    10,   60,   100,  120,  124,  126, 300, 1020}) {
      for (double offset : {0.0, 0.25, 3.0, -100.0, 3000.0}) {
        Tensor t(dtype, 2 * kPart + 100);
        t.fill([=](int64_t) {
          const double x = std::ldexp(noise() + offset, exponent);
          const uint64_t bits = truncated(dtype, x);
          return std::isfinite(oracle::decode(dtype, bits)) ? bits : 0;
        });
        check_distribution(
            "normal 2^" + std::to_string(exponent) + " * (x + " + std::to_string(offset) + ")", t);
      }
    }
  }
}

void ties_of_the_mx_formats() {
  for (DType dtype : float_dtypes()) {
    for (int top : {-140, -40, -12, 0, 7, 100}) {
      Tensor t(dtype, kPart + 32);
      const double near[] = {1,       1.75,      1.8125,     1.875,      0x1p-4,  0x1p-5,
                             0x1p-18, 0x1.8p-18, 0x1p-32,    0x1.8p-33,  0x1p-17, 0x1.fcp-5,
                             0,       0x1.02p-4, 0x1.02p-18, 0x1.02p-32, 1.5,     0x1.cffffep0};
      t.fill([&](int64_t i) {
        double x = std::ldexp(near[rng() % 18], top - static_cast<int>(i / 32 % 3));
        if (rng() % 3 == 0) x = std::nextafter(static_cast<float>(x), rng() % 2 ? 1e30f : 0.f);
        const uint64_t bits = truncated(dtype, rng() % 2 ? x : -x);
        return std::isfinite(oracle::decode(dtype, bits)) ? bits : 0;
      });
      check_distribution("ties at 2^" + std::to_string(top), t);
    }
  }
}

// Data that make roundings add up, lanes overflow, or the pivot of the part before be wrong.
void adversarial_data() {
  using Function = std::function<double(int64_t)>;
  const struct {
    const char* name;
    Function at;
  } kCases[] = {
      {"zeros", [](int64_t) { return 0.0; }},
      {"zeros of both signs", [](int64_t i) { return i % 3 ? 0.0 : -0.0; }},
      {"zeros of both signs among others",
       [](int64_t i) { return i % 5 == 0   ? -0.0
                              : i % 5 == 1 ? 0.0
                                           : noise(); }},
      {"constant", [](int64_t) { return 0.1; }},
      {"constant in smaller parts", [](int64_t i) { return i < kPart ? 9 * noise() : 0.1; }},
      {"extremes in any part",
       [](int64_t i) { return i == 3               ? 8.0
                              : i == 3 * kPart + 5 ? -8.25
                                                   : noise(); }},
      {"smallest normal", [](int64_t) { return std::ldexp(noise(), -124); }},
      {"40 exponents", [](int64_t i) { return std::ldexp(1.5, -static_cast<int>(i % 41)); }},
      {"skewed bits", [](int64_t i) { return i % 64 == 0 ? 1.0 : 0.0; }},
      {"one outlier", [](int64_t i) { return i == 5000 ? 1e6 : noise(); }},
      {"outliers in each block", [](int64_t i) { return i % 32 == 7 ? 1e4 * noise() : noise(); }},
      {"steps", [](int64_t i) { return static_cast<double>(i / kPart * 1000) + noise(); }},
      {"jump of scale", [](int64_t i) { return i / kPart % 2 ? 1e-20 * noise() : 1e10 * noise(); }},
      {"growing", [](int64_t i) { return static_cast<double>(i); }},
      {"positive", [](int64_t) { return std::fabs(noise()) + 0.3; }},
      {"all magnitudes",
       [](int64_t) { return std::ldexp(noise(), static_cast<int>(rng() % 250) - 125); }},
      {"log normal", [](int64_t) { return std::exp(4 * noise()); }},
      {"small squares", [](int64_t) { return std::exp(8 * noise() - 20); }},
      {"sparse", [](int64_t) { return rng() % 4 ? 0.0 : noise(); }},
      {"zero blocks", [](int64_t i) { return i / 32 % 3 ? 0.0 : noise(); }},
      {"same roundings", [](int64_t) { return 0x1.000002p0; }},
      {"symmetric roundings", [](int64_t i) { return i % 2 ? 0x1.6a09e6p0 : -0x1.6a09e6p0; }},
      {"nearly constant", [](int64_t i) { return 1 + static_cast<double>(i % 5) * 0x1p-23; }},
      {"nearly constant but one",
       [](int64_t i) { return i == 77 ? 2.0 : 1 + 0x1p-23 * (i % 3 == 0); }},
      {"NaN in one part", [](int64_t i) { return i == kPart + 3 ? std::nan("") : noise() + 1; }},
      {"subnormal in one part", [](int64_t i) { return i == kPart + 3 ? 1e-40 : noise(); }},
  };
  for (const auto& c : kCases) {
    for (DType dtype : float_dtypes()) {
      Tensor t(dtype, 4 * kPart + 45);
      t.fill([&](int64_t i) {
        const double x = c.at(i);
        const uint64_t bits = truncated(dtype, x);
        return std::isnan(x) == std::isnan(oracle::decode(dtype, bits)) ? bits : 0;
      });
      check_distribution(c.name, t);
    }
  }
}

void whole_chunks() {
  for (DType dtype : all_dtypes()) check_distribution("chunk", Tensor(dtype, kChunk + 5));
  for (DType dtype : all_dtypes()) {  // all in one bin: narrow counters have their largest value
    Tensor t(dtype, kChunk);
    t.fill([=](int64_t) { return oracle::is_float(dtype) ? truncated(dtype, 1.25) : 1; });
    check_distribution("ones", t);
  }
}

}  // namespace
}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  RUN(every_size_up_to_200_and_around_parts);
  RUN(any_bits_of_all_dtypes);
  RUN(normal_data_of_all_scales);
  RUN(ties_of_the_mx_formats);
  RUN(adversarial_data);
  RUN(whole_chunks);
  return check::report("distributions");
}
