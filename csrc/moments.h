// The state of a tensor, or of any part of one, and its three operations: update, merge, finalize.
//
// A state counts every element and describes the finite ones by their mean and m2, the sum of
// squared deviations from that mean:
//
//     count   elements seen              n   = count - nans - pos_infs - neg_infs
//     mean    (1/n) sum x
//     m2      sum (x - mean)^2           var = m2 / (n - correction)
//     norm    sqrt(sum x^2)              = sqrt(m2 + n mean^2): two terms >= 0, nothing cancels
//
// The sums sum(x) and sum(x^2) are never formed: their difference loses every digit of a variance
// that is small compared with the mean (Chan, Golub, LeVeque: "Algorithms for computing the sample
// variance", The American Statistician 37(3), 1983, section 1).
//
// Compiles for host and device and needs neither torch nor Python. It is the only definition of the
// state in C++; paramstats/_core/moments.py is the Python version, for the fallback and for reading
// results.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

#include "portable.h"

namespace paramstats {

// Five counts and four doubles, 72 bytes without padding. This is also the row format of a table of
// results (paramstats/_core/moments.py reads it with struct "=5q4d").
struct Moments {
  int64_t count = 0;  // all elements, finite or not; kAbsent means "there is no such tensor"
  int64_t zeros = 0;  // elements equal to zero, of either sign
  int64_t nans = 0;
  int64_t pos_infs = 0;
  int64_t neg_infs = 0;
  double mean = 0;  // this and the fields below: of the finite elements; NaN means "not read"
  double m2 = 0;
  double min = kInfinity;
  double max = -kInfinity;
};
static_assert(sizeof(Moments) == 72, "the row format is 5 int64 and 4 double");

PARAMSTATS_HD inline bool is_finite(double x) { return x - x == 0; }

constexpr int64_t kAbsent = -1;  // the count of a row without a tensor: a gradient that is None

PARAMSTATS_HD inline int64_t finite_count(const Moments& a) {
  return a.count - a.nans - a.pos_infs - a.neg_infs;
}

// The state of a tensor that was not read (e.g. a meta tensor): its count is known, its statistics
// are NaN.
PARAMSTATS_HD inline Moments unread(int64_t count) {
  return {count, 0, 0, 0, 0, kNaN, kNaN, kNaN, kNaN};
}

PARAMSTATS_HD inline bool is_unread(const Moments& a) { return a.mean != a.mean; }

// Merges the states of two disjoint parts: equations 2.1a and 2.1b of Chan, Golub, LeVeque:
// "Updating formulae and a pairwise algorithm for computing sample variances", Stanford
// STAN-CS-79-773, 1979, for means instead of sums. Equal means add no rounding to mean and m2, so
// the parts of a constant tensor merge to m2 == 0.
PARAMSTATS_HD inline Moments merge(const Moments& a, const Moments& b) {
  Moments out;
  out.count = a.count + b.count;
  out.zeros = a.zeros + b.zeros;
  out.nans = a.nans + b.nans;
  out.pos_infs = a.pos_infs + b.pos_infs;
  out.neg_infs = a.neg_infs + b.neg_infs;
  out.min = b.min < a.min ? b.min : a.min;
  out.max = b.max > a.max ? b.max : a.max;

  const double na = static_cast<double>(finite_count(a));
  const double nb = static_cast<double>(finite_count(b));
  if (na == 0 || nb == 0) {
    out.mean = na == 0 ? b.mean : a.mean;
    out.m2 = na == 0 ? b.m2 : a.m2;
    return out;
  }
  const double weight = nb / (na + nb);
  const double delta = b.mean - a.mean;
  out.mean = a.mean + times(delta, weight);
  out.m2 = a.m2 + b.m2 + times(times(delta, delta), times(na, weight));
  if (!(is_finite(delta))) {
    // Means of opposite sign near the limit of double: the difference overflows, the mean does not.
    out.mean = times(a.mean, 1 - weight) + times(b.mean, weight);
    out.m2 = kInfinity;
  }
  return out;
}

// Adds one element of any value to the state.
PARAMSTATS_HD inline void update(Moments& state, double x) {
  Moments one;
  one.count = 1;
  one.zeros = x == 0;
  one.nans = x != x;
  one.pos_infs = x > kLargest;
  one.neg_infs = x < -kLargest;
  if (is_finite(x)) one.mean = one.min = one.max = x;
  state = merge(state, one);
}

#if !defined(__CUDACC_RTC__)

// Adds n elements of any value to the state, in two passes. This is the exact routine that every
// fast kernel falls back to. n is the length of a block, small enough to stay in cache.
inline void update(Moments& state, const double* x, int64_t n) {
  constexpr int kLanes = 8;  // independent sums, so that the loops vectorize without -ffast-math
  Moments block;
  block.count = n;
  double sums[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i];
    const bool finite = is_finite(v);
    sums[i % kLanes] += finite ? v : 0.0;
    block.zeros += v == 0;
    block.nans += v != v;
    block.pos_infs += v > kLargest;
    block.neg_infs += v < -kLargest;
    block.min = finite && v < block.min ? v : block.min;
    block.max = finite && v > block.max ? v : block.max;
  }
  const int64_t finite_n = finite_count(block);
  if (finite_n > 0) {
    double sum = 0;
    for (double s : sums) sum += s;
    block.mean = sum / static_cast<double>(finite_n);
    if (!(is_finite(sum))) {  // the sum overflowed: add shares of the mean instead
      block.mean = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (is_finite(x[i])) block.mean += x[i] / static_cast<double>(finite_n);
      }
    }
    // Rounding must not move the mean out of [min, max]: the mean of a constant is the constant,
    // and the mean of elements near the limit of double is finite.
    block.mean = block.mean < block.min ? block.min : block.mean;
    block.mean = block.mean > block.max ? block.max : block.mean;
    double squares[kLanes] = {}, shifts[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const double d = is_finite(x[i]) ? x[i] - block.mean : 0.0;
      squares[i % kLanes] += d * d;
      shifts[i % kLanes] += d;
    }
    for (double s : squares) block.m2 += s;
    // Corrects m2 for the rounding error of the mean, which matters where the deviations are as
    // small as that error.
    double shift = 0;
    for (double s : shifts) shift += s;
    const double correction = shift * (shift / static_cast<double>(finite_n));
    if (correction <= kLargest && correction <= block.m2) block.m2 -= correction;
  }
  state = merge(state, block);
}

#endif

// The sums of n elements around a pivot, a value that the kernel expects to be near their mean.
struct ShiftedSums {
  double sum;     // of d = x - pivot
  double sum_sq;  // of d^2; not finite if any element is not
  double min, max;
  int64_t zeros;
};

enum class Fit {
  kGood,      // the state is valid
  kFar,       // the pivot is too far from the mean: try again with pivot + sum / n
  kUnusable,  // the sums cannot represent the elements: NaN, infinity, overflow or underflow of d^2
};

// Computes the state of n > 0 elements from their sums:
//
//     mean = pivot + sum / n              m2 = sum_sq - sum^2 / n
//
// The sums are accepted only if the subtraction is small: sum^2 / n <= max_shift_share * sum_sq. A
// sum of squares outside [min_squares, max_squares] may have lost digits to underflow or overflow.
PARAMSTATS_HD inline Fit from_sums(const ShiftedSums& s, int64_t n, double pivot,
                                   double max_shift_share, double min_squares, double max_squares,
                                   Moments& out) {
  if (!(s.sum_sq <= max_squares)) return Fit::kUnusable;
  out.count = n;
  out.zeros = s.zeros;
  out.min = s.min;
  out.max = s.max;
  if (s.min == s.max) {  // a constant: mean and m2 have no rounding
    out.mean = s.min;
    out.m2 = 0;
    return Fit::kGood;
  }
  if (s.sum_sq < min_squares) return Fit::kUnusable;  // around the mean it is even smaller
  const double shift = s.sum / static_cast<double>(n);
  const double shift_squares = times(s.sum, shift);
  if (!(shift_squares <= s.sum_sq * max_shift_share)) return Fit::kFar;
  out.mean = pivot + shift;
  out.m2 = s.sum_sq - shift_squares;
  return Fit::kGood;
}

#if !defined(__CUDACC_RTC__)

// The statistics that users see; paramstats/_core/moments.py has the same fields in the same order.
// All are doubles, so that each can be selected by its position.
struct Statistics {
  double count, mean, std, var, norm, rms, min, max, abs_max;
  double zero_count, zero_fraction, nan_count, pos_inf_count, neg_inf_count, nonfinite_count;
};
constexpr int kStatistics = sizeof(Statistics) / sizeof(double);

// The statistics of the finite elements alone, each divided by `scale` > 0: that of a scaled loss,
// which gradients still contain. Statistics are divided instead of the state, because the square of
// `scale` and m2 / scale^2 may leave the range of double where std and norm do not.
inline Statistics finalize_finite(const Moments& a, double correction, double scale = 1) {
  const double n = static_cast<double>(finite_count(a));
  const double zeros = static_cast<double>(a.zeros);
  Statistics out{n, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, zeros, kNaN, 0, 0, 0, 0};
  if (is_unread(a)) return out;
  if (n == 0) {
    out.norm = 0;
    return out;
  }
  const double freedom = n > correction ? n - correction : 0;  // at least 0, as in torch.var
  const double var = a.m2 / freedom;                           // 0 / 0 is NaN, as in torch
  const bool keeps_digits =
      std::isnormal(var);  // otherwise its root may still be an ordinary number
  out.mean = a.mean / scale;
  out.std = (keeps_digits ? std::sqrt(var) : std::sqrt(a.m2) / std::sqrt(freedom)) / scale;
  out.var = keeps_digits ? var / scale / scale : out.std * out.std;
  // hypot avoids the overflow and underflow of squares near the limits of double.
  out.norm = std::hypot(std::sqrt(a.m2), std::fabs(a.mean) * std::sqrt(n)) / scale;
  out.rms = std::hypot(std::sqrt(a.m2 / n), a.mean) / scale;
  out.min = a.min / scale;
  out.max = a.max / scale;
  out.abs_max = std::fmax(std::fabs(out.min), std::fabs(out.max));
  out.zero_fraction = zeros / n;
  return out;
}

// The statistics of all elements, as torch computes them: with a NaN most are NaN, with an infinity
// the norm is infinite.
inline Statistics finalize(const Moments& a, double correction, double scale = 1) {
  Statistics out = finalize_finite(a, correction, scale);
  out.count = static_cast<double>(a.count);
  out.nan_count = static_cast<double>(a.nans);
  out.pos_inf_count = static_cast<double>(a.pos_infs);
  out.neg_inf_count = static_cast<double>(a.neg_infs);
  out.nonfinite_count = static_cast<double>(a.count - finite_count(a));
  if (out.nonfinite_count == 0) return out;

  out.zero_fraction = out.zero_count / out.count;
  out.std = out.var = kNaN;
  if (a.nans > 0) {
    out.mean = out.norm = out.rms = out.min = out.max = out.abs_max = kNaN;
    return out;
  }
  out.mean = a.neg_infs == 0 ? kInfinity : a.pos_infs == 0 ? -kInfinity : kNaN;
  out.norm = out.rms = out.abs_max = kInfinity;
  if (a.neg_infs > 0) out.min = -kInfinity;
  if (a.pos_infs > 0) out.max = kInfinity;
  if (finite_count(a) == 0) {  // only infinities, perhaps all of one sign
    out.min = a.neg_infs > 0 ? -kInfinity : kInfinity;
    out.max = a.pos_infs > 0 ? kInfinity : -kInfinity;
  }
  return out;
}

#endif

}  // namespace paramstats
