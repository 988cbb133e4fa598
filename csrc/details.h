// What can be read of a tensor in addition to its Moments: its distribution, the state of each of
// its rows (the indices of dimension 0), and which rows are zero. For host and device.
//
// paramstats/_core/details.py describes the packed format in which Python gets them.
#pragma once

#include "dtypes.h"
#include "moments.h"

namespace paramstats {

// ---- the distribution --------------------------------------------------------------------------

// The sums of powers of the deviations from the mean, of the finite elements. (Pebay: "Formulas for
// robust, one-pass parallel computation of covariances and arbitrary-order statistical moments",
// SAND2008-6212, 2008.)
struct HigherMoments {
  int64_t n = 0;
  double mean = 0;
  double m2 = 0, m3 = 0, m4 = 0;  // sums of (x - mean)^k
  double abs_mean = 0;
};

// Equations 2.1, 3.1 and 3.2 of the paper, for two disjoint parts.
PARAMSTATS_HD inline HigherMoments merge(const HigherMoments& a, const HigherMoments& b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  const double na = static_cast<double>(a.n), nb = static_cast<double>(b.n), n = na + nb;
  const double wa = na / n, wb = nb / n, delta = b.mean - a.mean, d2 = times(delta, delta);
  const double ab = times(na, wb);  // na nb / n
  HigherMoments out;
  out.n = a.n + b.n;
  out.mean = is_finite(delta) ? a.mean + times(delta, wb) : times(a.mean, wa) + times(b.mean, wb);
  out.m2 = a.m2 + b.m2 + times(d2, ab);
  out.m3 = a.m3 + b.m3 + times(times(times(d2, delta), ab), wa - wb) +
           times(times(3, delta), times(wa, b.m2) - times(wb, a.m2));
  out.m4 = a.m4 + b.m4 +
           times(times(times(d2, d2), ab), times(wa, wa) - times(wa, wb) + times(wb, wb)) +
           times(times(6, d2), times(times(wa, wa), b.m2) + times(times(wb, wb), a.m2)) +
           times(times(4, delta), times(wa, b.m3) - times(wb, a.m3));
  out.abs_mean = a.abs_mean + times(b.abs_mean - a.abs_mean, wb);
  return out;
}

// Sums of powers of d = x - pivot, and of |x|, of finite elements.
struct PowerSums {
  double d1 = 0, d2 = 0, d3 = 0, d4 = 0, abs = 0;
};

// The moments of `count` > 0 elements, from their sums around a pivot near the mean.
PARAMSTATS_HD inline HigherMoments centered(const PowerSums& s, int64_t count, double pivot) {
  const double n = static_cast<double>(count), shift = s.d1 / n, shift2 = times(shift, shift);
  HigherMoments out;
  out.n = count;
  out.mean = is_finite(shift) ? pivot + shift : pivot;
  out.m2 = s.d2 - times(n, shift2);
  out.m3 = s.d3 - times(times(3, shift), s.d2) + times(times(2, n), times(shift2, shift));
  out.m4 = s.d4 - times(times(4, shift), s.d3) + times(times(6, shift2), s.d2) -
           times(times(3, n), times(shift2, shift2));
  out.m2 = out.m2 < 0 ? 0 : out.m2;
  out.m4 = out.m4 < 0 ? 0 : out.m4;
  out.abs_mean = s.abs / n;
  return out;
}

// Moments with NaN of one sign, so that equal moments have equal bytes.
PARAMSTATS_HD inline HigherMoments packed(HigherMoments a) {
  double* const numbers[] = {&a.mean, &a.m2, &a.m3, &a.m4, &a.abs_mean};
  for (double* x : numbers) {
    if (*x != *x) *x = kNaN;
  }
  return a;
}

// The formats that elements can be converted to with a scale per block (OCP Microscaling Formats
// Specification 1.0): a power of two, such that the largest element of a block has the exponent
// kMaxExponent of the format.
enum MxFormat { kFloat4E2M1, kMxFloat8E4M3FN, kMxFloat8E5M2, kMxFormats };
constexpr int kMxBlock = 32;  // adjacent elements
constexpr int kMxMaxExponent[kMxFormats] = {2, 8, 15};
// Elements of at most this size, divided by the scale, become 0: half of the smallest subnormal.
constexpr double kMxFlushed[kMxFormats] = {0x1p-2, 0x1p-10, 0x1p-17};
// Elements from this size on, divided by the scale, would be rounded above the largest number.
// (464 is between two numbers, and is rounded to the even one, 448.)
constexpr double kMxSaturated[kMxFormats] = {7, 0x1.d000000000001p8, 61440};

struct MxCounts {
  int64_t underflow = 0, overflow = 0;
};

// Counts by sign and binary exponent: bin k counts the elements with 2^(first + k) <= |x| <
// 2^(first + k + 1), subnormal ones included. All dtypes but float64 have exponents in the narrow
// range.
struct ExponentRange {
  int first, bins;  // bins of each sign
};
constexpr ExponentRange kNarrow = {-149, 149 + 128}, kWide = {-1074, 1074 + 1024};

PARAMSTATS_HD constexpr ExponentRange exponents_of(DType dtype) {
  // (Device code may use the values of these constants, but not refer to them.)
  return dtype == DType::kFloat64 ? ExponentRange{kWide.first, kWide.bins}
                                  : ExponentRange{kNarrow.first, kNarrow.bins};
}

// The begin of a packed distribution. 2 `bins` counts follow: of negative elements, then of
// positive ones, without empty bins at both ends.
struct DistributionHead {
  int64_t first = 0, bins = 0;
  HigherMoments moments;
  MxCounts mx[kMxFormats];
};
static_assert(sizeof(DistributionHead) == 8 * 14, "struct =3q5d6q");

// ---- rows --------------------------------------------------------------------------------------

// The state of a row. The statistics are those of its finite elements.
struct RowState {
  double mean = 0, m2 = 0, abs_max = 0;
  int64_t zeros = 0, nonfinite = 0;
  uint64_t hash = 0;  // of all elements and their places in the row; a sum over elements
};
static_assert(sizeof(RowState) == 48, "struct =3d2qQ");

struct RowsHead {
  int64_t rows, row_numel;
};

// Zero rows are the number of rows (int64) and a bit for each, if some rows are zero but not all;
// or this byte if they were not looked for, though the tensor has enough zeros for one: each row
// needs memory.
constexpr char kNotKnown = '?';
constexpr int64_t kMostRows = int64_t{1} << 20;

// What a call reads of a tensor in addition to its Moments; kNoZeroRows: without its zero rows.
constexpr uint8_t kReadDistribution = 1, kReadRows = 2, kNoZeroRows = 4;

}  // namespace paramstats
