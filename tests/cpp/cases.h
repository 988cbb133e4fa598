// The tests that every backend must pass: test_kernels.cpp runs them at each SIMD level of the CPU
// backend, test_cuda_kernels.cpp with the CUDA backend. They compare with oracle.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "tensor.h"

namespace paramstats::test {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// The states of some tensors, computed by one backend.
struct Result {
  std::string backend;
  std::vector<Moments> states;
};

// Each test program defines these: the results of all backends that it tests, and the sizes at
// which their kernels change from one path to another, the largest last.
std::vector<Result> summarize(const Tensors& tensors);
std::vector<int64_t> boundary_sizes(DType dtype);

inline void check_all(const std::string& what, const Tensors& tensors,
                      const oracle::Bounds* tighter = nullptr) {
  const std::vector<Result> results = summarize(tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const auto truth = oracle::truth_of(t.values());
    for (const Result& result : results) {
      check::at(result.backend + " " + what + " " + name_of(t.dtype) +
                " n=" + std::to_string(t.numel()) + "+" + std::to_string(t.first));
      oracle::check_state(result.states[i], truth, tighter ? *tighter : bounds(t.dtype));
    }
  }
}

// Values that a simple sum gets wrong: means far above the deviations, squares outside the range of
// float32, outliers, subnormals, blocks with different distributions, NaN and infinities.
constexpr int64_t kBlock = cpu::kBlock;
constexpr int64_t kCaseSize = 5 * kBlock + 13;  // several CPU blocks or CUDA chunks, a remainder

inline const struct {
  const char* name;
  double (*value_at)(int64_t i);
} kDifficultValues[] = {
    {"N(1000, 0.02)", [](int64_t) { return 1000 + 0.02 * noise(); }},
    {"N(-1e6, 1)", [](int64_t) { return -1e6 + noise(); }},
    {"1 + 1e-4 noise", [](int64_t) { return 1 + 1e-4 * noise(); }},
    {"constant 0.1", [](int64_t) { return 0.1; }},
    {"constant largest", [](int64_t) { return double{FLT_MAX}; }},
    {"constant smallest", [](int64_t) { return double{FLT_TRUE_MIN}; }},
    {"zeros of both signs", [](int64_t i) { return i % 2 ? 0.0 : -0.0; }},
    {"1e30", [](int64_t) { return 1e30 * noise(); }},
    {"1e30 + 1e26 noise", [](int64_t) { return 1e30 + 1e26 * noise(); }},
    {"largest of both signs", [](int64_t i) { return i % 2 ? FLT_MAX : -double{FLT_MAX}; }},
    {"1e-30", [](int64_t) { return 1e-30 * noise(); }},
    {"1e-30 + 1e-34 noise", [](int64_t) { return 1e-30 + 1e-34 * noise(); }},
    {"squares just representable", [](int64_t) { return 1e-19 * noise(); }},
    {"squares just too small", [](int64_t) { return 2e-21 * noise(); }},
    {"sum of squares just too large", [](int64_t) { return 1e18 * noise(); }},
    {"squares and sum vanish", [](int64_t i) { return i % 2 ? 1e-30 : -1e-30; }},
    {"1e6 first", [](int64_t i) { return i == 0 ? 1e6 : 1e-6; }},
    {"1e6 middle", [](int64_t i) { return i == kCaseSize / 2 ? 1e6 : 1e-6; }},
    {"1e6 last", [](int64_t i) { return i == kCaseSize - 1 ? 1e6 : 1e-6; }},
    {"1e6 among 1e-6 noise", [](int64_t i) { return i == 100 ? 1e6 : 1e-6 * noise(); }},
    {"subnormals", [](int64_t) { return 1e-40 * noise(); }},
    {"subnormals and zeros", [](int64_t i) { return i % 3 ? 0.0 : double{FLT_TRUE_MIN}; }},
    {"block means alternate",
     [](int64_t i) { return (i / kBlock % 2 ? 1e8 : -1e-3) * (3 + noise()); }},
    {"every block larger", [](int64_t i) { return std::pow(1e4, i / kBlock) * (9 + noise()); }},
    {"steps inside blocks", [](int64_t i) { return i / 100 % 2 ? 1e5 : 1e-5 * noise(); }},
    {"constant block after noise", [](int64_t i) { return i / kBlock == 1 ? 0.1 : noise(); }},
    {"noise after constant", [](int64_t i) { return i < kBlock ? 1e4 : noise(); }},
    {"one NaN block", [](int64_t i) { return i / kBlock == 1 ? kNaN : 1000 + 0.02 * noise(); }},
    {"NaN first", [](int64_t i) { return i == 0 ? kNaN : 1000 + 0.02 * noise(); }},
    {"inf early", [](int64_t i) { return i == 37 ? kInf : 1000 + 0.02 * noise(); }},
    {"-inf middle", [](int64_t i) { return i == kCaseSize / 2 ? -kInf : 1000 + 0.02 * noise(); }},
    {"NaN near the end", [](int64_t i) { return i == kCaseSize - 14 ? kNaN : 1000 + noise(); }},
    {"inf last", [](int64_t i) { return i == kCaseSize - 1 ? kInf : 1000 + 0.02 * noise(); }},
    {"all NaN", [](int64_t) { return kNaN; }},
    {"all +inf", [](int64_t) { return kInf; }},
    {"all -inf", [](int64_t) { return -kInf; }},
    {"infinities", [](int64_t i) { return i % 2 ? kInf : -kInf; }},
    {"mixture",
     [](int64_t i) {
       const double values[] = {kNaN, kInf, -kInf, 0, noise()};
       return values[i % 5];
     }},
};

// A tensor of float64, float32 or bfloat16 values, all rounded to float32 first.
inline Tensor tensor_of(DType dtype, int64_t n, double (*value_at)(int64_t)) {
  Tensor t(dtype, n);
  t.fill([=](int64_t i) {
    const float narrow = static_cast<float>(value_at(i));
    const double wide = narrow;
    uint64_t bits = 0;
    if (dtype == DType::kFloat64) std::memcpy(&bits, &wide, sizeof(wide));
    if (dtype != DType::kFloat64) std::memcpy(&bits, &narrow, sizeof(narrow));
    return dtype == DType::kBFloat16 ? bits >> 16 : bits;
  });
  return t;
}

inline void difficult_values() {
  for (const auto& [name, value_at] : kDifficultValues) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      check_all(name, {tensor_of(dtype, kCaseSize, value_at)}, &oracle::kFloatLanes);
    }
  }
}

// Every pattern is an only element, and fills all lanes of the widest vector. For 16 bits the CUDA
// shim would need a minute, so there kStep patterns share a tensor.
template <int kStep>
void every_bit_pattern_is_decoded() {
  for (DType dtype : all_dtypes()) {
    if (element_size(dtype) > 2) continue;
    const uint64_t patterns = uint64_t{1} << (8 * element_size(dtype));
    const uint64_t step = element_size(dtype) == 1 ? 1 : kStep;
    for (uint64_t begin = 0; begin < patterns; begin += 4096) {
      Tensors tensors;
      for (uint64_t bits = begin; bits < std::min(begin + 4096, patterns); bits += step) {
        for (int64_t n : {1, 64}) {
          if (n == 1 && bits % (step * step) != 0) continue;
          tensors.emplace_back(dtype, n);
          tensors.back().fill([=](int64_t i) { return bits + i % step; });
        }
      }
      check_all("patterns from " + std::to_string(begin), tensors);
    }
  }
}

inline void extremes_of_wide_integers_are_exact() {
  Tensors tensors;
  for (DType dtype : {DType::kInt32, DType::kUInt32, DType::kInt64, DType::kUInt64}) {
    const uint64_t top = uint64_t{1} << (8 * element_size(dtype) - 1);
    // Smallest and largest, signed or not; one that double must round.
    for (uint64_t edge : {uint64_t{0}, ~uint64_t{0}, top, top - 1, (uint64_t{1} << 53) + 1}) {
      tensors.emplace_back(dtype, 100);
      tensors.back().fill([=](int64_t i) { return i % 9 == 0 ? edge : i % 9; });
    }
  }
  check_all("edges", tensors, &oracle::kDoubleLanes);
}

inline void every_size_at_every_address() {
  for (DType dtype : all_dtypes()) {
    const int64_t per_16_bytes = 16 / element_size(dtype);
    Tensors tensors;
    for (int64_t first = 0; first <= per_16_bytes; ++first) {
      for (int64_t n :
           {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 4099}) {
        tensors.emplace_back(dtype, n, first);
      }
    }
    for (int64_t first : {int64_t{0}, int64_t{1}, per_16_bytes - 1}) {
      for (int64_t n : boundary_sizes(dtype)) tensors.emplace_back(dtype, n, first);
    }
    check_all("sizes", tensors);
  }
}

inline void constants_have_no_variance() {  // check_state requires it
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {int64_t{2}, int64_t{3}, int64_t{100}, boundary_sizes(dtype).back()}) {
      for (int repetition = 0; repetition < (n > 100 ? 3 : 20); ++repetition) {
        const uint64_t bits = oracle::random_bits(dtype, rng);
        tensors.emplace_back(dtype, n);
        tensors.back().fill([=](int64_t) { return bits; });
      }
    }
  }
  check_all("constant", tensors);
}

// Narrow lanes count up to 255; a chunk of zeros has more of them in each lane.
inline void zeros_of_both_signs_are_counted() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    const uint64_t negative = oracle::is_float(dtype) ? oracle::sign_bit(dtype) : 0;
    for (int64_t n : {int64_t{5}, kBlock, boundary_sizes(dtype).back()}) {
      for (int every : {1, 3}) {
        tensors.emplace_back(dtype, n);
        tensors.back().fill([=](int64_t i) { return i % every ? negative : 0; });
      }
    }
  }
  check_all("zeros", tensors);
}

// The CPU kernels compare narrow floats as integers, so the result depends on the signs.
inline void extremes_of_one_sign() {
  enum { kPositive, kNegative, kPositiveAndZero, kNegativeAndOnePositive, kKinds };
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    if (!oracle::is_float(dtype)) continue;
    const uint64_t sign = oracle::sign_bit(dtype);
    for (int64_t n : {1, 3, 64, 100, 1000, 9999}) {
      for (int kind = 0; kind < kKinds; ++kind) {
        tensors.emplace_back(dtype, n);
        tensors.back().fill([=](int64_t i) {
          uint64_t bits = oracle::random_bits(dtype, rng) & ~sign;
          if (kind % 2) bits |= sign;
          if (kind >= kPositiveAndZero && i == n / 2) bits = kind % 2 ? bits ^ sign : 0;
          return bits;
        });
      }
    }
  }
  check_all("one sign", tensors);
}

// The CPU kernels count no zeros of 16-bit floats until they find one, and compute no minimum of
// the magnitudes once both signs occurred. Here the first elements have no zero, and both signs or
// one.
inline void rare_elements_after_many_without_zeros() {
  const int64_t n = kCaseSize;
  for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    const uint64_t sign = oracle::sign_bit(dtype);
    const oracle::FloatFormat f = oracle::float_format(dtype);
    const uint64_t one = static_cast<uint64_t>(f.bias()) << f.mantissa_bits;
    const uint64_t largest = (sign - 1) ^ (uint64_t{1} << f.mantissa_bits);
    Tensors tensors;
    for (int signs : {0, 1, 2}) {  // both, positive, negative
      for (uint64_t rare : {one, uint64_t{0}, sign, uint64_t{1}, sign | 1, largest, sign | largest,
                            sign - 1, sign | (sign - 1)}) {
        for (int64_t at : {int64_t{5}, kBlock, n / 2, n - 14, n - 1}) {
          tensors.emplace_back(dtype, n, 1);
          tensors.back().fill([=](int64_t i) {
            const uint64_t magnitude = one + rng() % 64;
            return signs == 2 || (signs == 0 && i % 2) ? sign | magnitude : magnitude;
          });
          tensors.back().set(1 + at, rare);
        }
      }
    }
    check_all("rare", tensors);
  }
}

// The patterns around infinity, at every kind of position.
inline void one_nan_or_infinity_at_any_position() {
  for (DType dtype : all_dtypes()) {
    if (!oracle::is_float(dtype)) continue;
    const oracle::FloatFormat f = oracle::float_format(dtype);
    const uint64_t sign = oracle::sign_bit(dtype);
    const uint64_t mantissa = (uint64_t{1} << f.mantissa_bits) - 1;
    const uint64_t infinity = (sign - 1) & ~mantissa;  // a number in e4m3fn
    Tensors tensors;
    for (uint64_t bits : {infinity, sign | infinity, infinity | 1, infinity | mantissa,
                          sign | infinity | mantissa}) {
      for (int64_t n : {int64_t{1}, int64_t{70}, boundary_sizes(dtype).back()}) {
        for (int64_t at : {int64_t{0}, n / 3, n / 2, n - 1}) {
          tensors.emplace_back(dtype, n, 1);
          tensors.back().set(1 + at, bits);
        }
      }
    }
    check_all("one pattern", tensors);
  }
}

// Runs what every backend must pass. `kStep`: see every_bit_pattern_is_decoded.
template <int kStep>
void run_cases() {
  RUN(every_bit_pattern_is_decoded<kStep>);
  RUN(extremes_of_wide_integers_are_exact);
  RUN(every_size_at_every_address);
  RUN(constants_have_no_variance);
  RUN(zeros_of_both_signs_are_counted);
  RUN(extremes_of_one_sign);
  RUN(one_nan_or_infinity_at_any_position);
  RUN(difficult_values);
}

}  // namespace paramstats::test
