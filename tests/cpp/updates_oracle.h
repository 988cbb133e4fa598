// The expected rows of an update, in long double from the definitions of AdamW's step. Shares no
// code with csrc: dw is the difference of the weights after and before a step, which is undone, and
// an update is lost if the weight before the step rounds to the weight after it.
#pragma once

#include <cmath>
#include <vector>

#include "oracle.h"

namespace oracle {

struct Step {
  double lr, decay, beta1, beta2, eps;
  int step;
};

inline long double bias_correction(double beta, int step) {
  long double power = 1;
  for (int i = 0; i < step; ++i) power *= beta;
  return 1 - power;
}

inline long double adamw_update(double w, double m, double v, const Step& s) {
  if (std::isinf(w)) return -w * s.decay;  // what the formula gives; the difference is NaN
  const long double m_hat = m / bias_correction(s.beta1, s.step);
  const long double v_hat = v / bias_correction(s.beta2, s.step);
  const long double change = s.lr * m_hat / (sqrtl(v_hat) + s.eps);
  const long double before = (w + change) / (1 - static_cast<long double>(s.lr) * s.decay);
  return w - before;
}

inline long double squared_lag(double g, double v, const Step& s) {
  const long double v_hat = v / bias_correction(s.beta2, s.step);
  const long double least = static_cast<long double>(s.eps) * s.eps;
  return static_cast<long double>(g) * g / (v_hat < least ? least : v_hat);
}

// The distance from a finite value to the middle between it and its neighbor above or below. Both
// have the same distance at the largest value, whose upper neighbor would be 2^k.
inline double half_step(DType dtype, uint64_t bits, bool above) {
  const double w = decode(dtype, bits);
  const uint64_t sign = sign_bit(dtype), magnitude = bits & ~sign;
  const bool outward = magnitude == 0 || above == (w > 0);
  const uint64_t infinity = ((uint64_t{1} << float_format(dtype).exponent_bits) - 1)
                            << float_format(dtype).mantissa_bits;
  if (outward && magnitude + 1 == infinity) return half_step(dtype, bits, !above);
  const double neighbor = decode(dtype, outward ? magnitude + 1 : magnitude - 1);
  return std::fabs(neighbor - std::fabs(w)) / 2;
}

// Whether w - dw rounds to w. Not for float64, whose half steps need more digits.
inline bool is_lost(DType dtype, uint64_t bits, double dw) {
  if (dw == 0) return true;
  const double half = half_step(dtype, bits, dw < 0);
  return std::fabs(dw) < half || (std::fabs(dw) == half && (bits & 1) == 0);
}

// A row of products: how many are not finite, the mean of the others and of their absolute values.
struct ProductsTruth {
  int64_t count = 0, not_finite = 0;
  long double mean = 0, size = 0;
};

inline ProductsTruth truth_of_products(const std::vector<long double>& products) {
  ProductsTruth t;
  for (long double p : products) {
    ++t.count;
    if (!(fabsl(p) <= std::numeric_limits<double>::max())) {
      ++t.not_finite;
      continue;
    }
    t.mean += p;
    t.size += fabsl(p);
  }
  const int64_t n = t.count - t.not_finite;
  if (n > 0) t.mean /= n, t.size /= n;
  return t;
}

// `bound` is relative to the mean of the absolute values.
inline void check_products(const Moments& got, const ProductsTruth& want, double bound) {
  CHECK(got.count, want.count);
  CHECK(got.nans, want.not_finite);
  CHECK(got.pos_infs, 0);
  CHECK(got.neg_infs, 0);
  CHECK_NEAR(got.mean, want.mean, bound * want.size);
}

}  // namespace oracle
