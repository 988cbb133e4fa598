// Values that a careless sum gets wrong: means far above the deviations, squares out of float32's
// range, outliers, subnormals, blocks that have nothing in common, NaN and infinities.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "../../csrc/cpu/kernels.h"
#include "tensor.h"

namespace paramstats::cpu::test {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr int64_t kHostile = 5 * kBlock + 13;  // blocks to carry a pivot over, and a remainder

struct Hostile {
  const char* name;
  double (*at)(int64_t i);
};

inline const Hostile kHostiles[] = {
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
    {"squares' sum just too large", [](int64_t) { return 1e18 * noise(); }},
    {"squares and sum vanish", [](int64_t i) { return i % 2 ? 1e-30 : -1e-30; }},
    {"1e6 first", [](int64_t i) { return i == 0 ? 1e6 : 1e-6; }},
    {"1e6 middle", [](int64_t i) { return i == kHostile / 2 ? 1e6 : 1e-6; }},
    {"1e6 last", [](int64_t i) { return i == kHostile - 1 ? 1e6 : 1e-6; }},
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
    {"all NaN", [](int64_t) { return double{kNaN}; }},
    {"all +inf", [](int64_t) { return double{kInf}; }},
    {"all -inf", [](int64_t) { return -double{kInf}; }},
    {"infinities", [](int64_t i) { return i % 2 ? kInf : -double{kInf}; }},
    {"all sorts",
     [](int64_t i) {
       const double sorts[] = {kNaN, kInf, -kInf, 0, noise()};
       return sorts[i % 5];
     }},
};

// The values as float32 holds them, in tensors of either width.
inline Tensor hostile(DType dtype, double (*at)(int64_t)) {
  Tensor t(dtype, kHostile);
  t.fill([=](int64_t i) {
    const float narrow = static_cast<float>(at(i));
    const double wide = narrow;
    uint64_t bits = 0;
    if (dtype == DType::kFloat32) std::memcpy(&bits, &narrow, sizeof(narrow));
    if (dtype == DType::kFloat64) std::memcpy(&bits, &wide, sizeof(wide));
    return bits;
  });
  return t;
}

}  // namespace paramstats::cpu::test
