// The update dw of a parameter by an optimizer's last step, and products of the gradient g, the
// first moment m, the second moment v and dw. Compiles for host and device.
//
// An update is read into four rows of a table. Row 0 is the state of dw. The others are rows of
// products: their mean is that of the finite products, `nans` counts the products that are not
// finite, `zeros` has a meaning in the row kLag only, and the remaining fields have none.
#pragma once

#include "dtypes.h"
#include "moments.h"

namespace paramstats {

enum UpdateRow {
  kUpdate,        // dw; `zeros` counts the elements of the parameter that did not change
  kGradMomentum,  // g * m
  kUpdateGrad,    // dw * g
  kLag,           // g^2 / max(v / bc2, eps^2); `zeros` counts the elements with v / bc2 < eps^2
  kUpdateRows
};

// Where dw comes from: nowhere; formula() below; the parameter minus a copy from before the step.
enum class UpdateMethod : int32_t { kNone, kFormula, kDifference };

// A row of products: `sum` is that of the finite ones.
PARAMSTATS_HD inline Moments row_of_products(int64_t count, int64_t not_finite, double sum,
                                             int64_t zeros = 0) {
  const int64_t n = count - not_finite;
  return {count, zeros, not_finite, 0, 0, n > 0 ? sum / static_cast<double>(n) : 0, 0, 0, 0};
}

// The hyperparameters of Adam and AdamW. `decay` is the weight decay if it is decoupled from the
// gradient, else 0.
struct Hyperparameters {
  double lr, decay, beta1, beta2, eps;
};

// What the formulas need of the hyperparameters and the step, in the precision of the elements.
template <class T>
struct StepConstants {
  T of_weight, of_moment, eps;  // of formula()
  T least_variance;             // v / bc2 < eps^2 exactly if v < least_variance
  T least_root;                 // the root of least_variance
  double bc2;                   // the factor of the squares of lag_root()
  bool fit;                     // whether none of them underflows or overflows in T
};

// Sums of squares below it may be those of elements that lost digits in float32.
constexpr double kMinUpdateSquares = 1e-70;

// Whether x neither underflows nor overflows in T.
PARAMSTATS_HD inline bool fits(double, double) { return true; }
PARAMSTATS_HD inline bool fits(double x, float) {
  const double size = x < 0 ? -x : x;
  return !(size > 0 && size < 0x1p-126) && !(size >= 0x1p128 && size <= kLargest);
}

PARAMSTATS_HD inline double rounded_up(double x, double) { return x; }

// The smallest float that is not below x >= 0.
PARAMSTATS_HD inline float rounded_up(double x, float) {
  const float near = static_cast<float>(x);
  return near < x ? from_bits(bits_of(near) + 1) : near;
}

// With t = step, bc1 = 1 - beta1^t, bc2 = 1 - beta2^t and a = lr * decay, AdamW computes
//
//     w = (1 - a) old - u          u = lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)
//
// so that w - old = -(a w + u) / (1 - a).
template <class T>
PARAMSTATS_HD inline StepConstants<T> step_constants(const Hyperparameters& h, double step) {
  const double bc1 = 1 - pow(h.beta1, step), bc2 = 1 - pow(h.beta2, step);
  const double a = times(h.lr, h.decay), root = sqrt(bc2);
  const double of_weight = a / (1 - a), of_moment = times(h.lr / bc1, root) / (1 - a);
  const double eps = times(h.eps, root);
  StepConstants<T> out;
  out.of_weight = static_cast<T>(of_weight);
  out.of_moment = static_cast<T>(of_moment);
  out.eps = out.least_root = static_cast<T>(eps);
  out.least_variance = rounded_up(times(times(h.eps, h.eps), bc2), T());
  out.bc2 = bc2;
  out.fit = fits(of_weight, T()) && fits(of_moment, T()) && fits(eps, T());
  return out;
}

// The functions of elements or SIMD lanes write their results to references: clang does not let
// code for AVX call a function for any CPU that returns a vector of AVX, even if it is inlined.

// dw of an element. `root` is sqrt(v). (m / root is of moderate size where m * lr may underflow.)
template <class V, class T>
PARAMSTATS_INLINE void formula(const V& w, const V& m, const V& root, const StepConstants<T>& k,
                               V& dw) {
#if defined(__CUDA_ARCH__)
  dw = -(times(k.of_weight, w) + times(k.of_moment, m / (root + k.eps)));
#else
  dw = -(k.of_weight * w + k.of_moment * (m / (root + k.eps)));
#endif
}

// The lag of an element is bc2 times the square of `out`.
template <class V, class T>
PARAMSTATS_INLINE void lag_root(const V& g, const V& v, const V& root, const StepConstants<T>& k,
                                V& out) {
  out = g / (v < k.least_variance ? V() + k.least_root : root);
}

// The bits of a float dtype, as far as rounding to it needs them.
struct Precision {
  int digits;           // bits of the significand, the leading one included
  double least_normal;  // 2^-126 or 2^-14; below it, all steps are equal
};

PARAMSTATS_HD constexpr Precision precision_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return {11, 0x1p-14};
    case DType::kBFloat16: return {8, 0x1p-126};
    case DType::kFloat32: return {24, 0x1p-126};
    default: return {53, 0x1p-1022};
  }
}

PARAMSTATS_HD constexpr int digits_of(float) { return 24; }
PARAMSTATS_HD constexpr int digits_of(double) { return 53; }

// Whether w - dw, rounded to T, is w again; of SIMD lanes: a mask. False if dw is not finite.
template <class V, class Mask>
PARAMSTATS_INLINE void is_lost_in_own_precision(const V& w, const V& dw, Mask& out) {
  out = (Mask)((w - dw) - w == 0);
}

// Whether w - dw, rounded to the dtype of w (to nearest, ties to even), is w again: then the update
// was lost in rounding. False if dw is not finite. kDType is that of w, whose elements T
// represents exactly. No rounding here: it compares dw with half the distance to the next value.
template <DType kDType, class T>
PARAMSTATS_INLINE bool is_lost(T w, T dw) {
  constexpr Precision p = precision_of(kDType);
  constexpr int kDigits = digits_of(T());
  if constexpr (p.digits >= kDigits) {
    bool is_lost;
    is_lost_in_own_precision(w, dw, is_lost);
    return is_lost;
  } else {
    using Bits = decltype(bits_of(w));
    constexpr T kLeast = static_cast<T>(p.least_normal);
    constexpr Bits kMantissa = (Bits{1} << (kDigits - 1)) - 1;
    constexpr Bits kLast = Bits{1} << (kDigits - p.digits);
    constexpr T kHalf = T{1} / (Bits{1} << p.digits);  // half a step of 1
    const T size = w < 0 ? -w : w, change = dw < 0 ? -dw : dw;
    // Subnormal values of the dtype have the steps of the smallest normal one.
    const T normal = size < kLeast ? size + kLeast : size;
    const Bits bits = bits_of(normal);
    const T half = times(from_bits(bits & ~kMantissa), kHalf);
    // Steps below a power of two are half as large.
    const bool is_edge = (bits & kMantissa) == 0 && size > kLeast && (w < 0) == (dw < 0);
    const T rest = (is_edge ? times(half, T{0.5}) : half) - change;
    return rest > 0 || (rest == 0 && (bits & kLast) == 0);
  }
}

}  // namespace paramstats
