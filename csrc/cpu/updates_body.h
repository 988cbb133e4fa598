// The rows of an update (updates.h). A part of kernels_body.h, which includes it once per SIMD
// level and states the rules for its code.
//
// Elements are read in blocks of kUpdateBlock. Their arithmetic is float32 if all operands are
// float32 or narrower: dw, g / sqrt(v) and sqrt(v) are written to buffers in the cache, and the
// kernel of float32 summarizes dw. Products are summed in float64 lanes, where those of two float32
// are exact. A block that has anything which is not finite is computed again in float64, like every
// block with an operand of float64.

// The operands of a block, all of the dtype S. Null: there is none.
template <class S>
struct BlockOperands {
  const S *param, *old, *grad, *momentum, *variance;
};

// The n elements of an operand from element `begin` on, converted to S in `buffer` unless they are
// aligned elements of S.
template <class T, class S>
inline const S* converted(const void* data, int64_t begin, int64_t n, S* buffer) {
  const auto* x = static_cast<const typename T::Storage*>(data) + begin;
  convert<T>(x, n, buffer);
  return buffer;
}
template <class S>
inline const S* load_operand(const Operand& operand, int64_t begin, int64_t n, S* buffer) {
  if (operand.data == nullptr) return nullptr;
  constexpr DType kSame = sizeof(S) == 4 ? DType::kFloat32 : DType::kFloat64;
  if (operand.dtype == kSame) {
    const auto* x = static_cast<const S*>(operand.data) + begin;
    if (reinterpret_cast<uintptr_t>(x) % sizeof(S) == 0) return x;
    __builtin_memcpy(buffer, x, n * sizeof(S));
    return buffer;
  }
  switch (operand.dtype) {
    case DType::kBFloat16: return converted<OrderedBFloat16>(operand.data, begin, n, buffer);
    case DType::kFloat16: return converted<Float16>(operand.data, begin, n, buffer);
    default: return converted<Native<float, InFloat>>(operand.data, begin, n, buffer);
  }
}

template <class S>
struct LanesFor;
template <>
struct LanesFor<float> {
  using Type = InFloat;
};
template <>
struct LanesFor<double> {
  using Type = InDouble;
};

// A sum of products. A float32 block is only used if its sums are finite, so that only float64
// products need to be checked one by one.
struct Products {
  double sum = 0;
  int64_t not_finite = 0;
};

template <class S>
inline Products dot(const S* a, const S* b, int64_t n) {
  constexpr int kWidth = InDouble::kWidth, kUnrolled = 4;
  DoubleLanes sums[kUnrolled] = {};
  Int64Lanes finite = {};
  int64_t i = 0;
  for (; i + kUnrolled * kWidth <= n; i += kUnrolled * kWidth) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnrolled; ++k) {
      const auto x = load_converted<DoubleLanes>(a + i + k * kWidth);
      const auto y = load_converted<DoubleLanes>(b + i + k * kWidth);
      if constexpr (sizeof(S) == 4) {
        sums[k] += x * y;
      } else {
        const DoubleLanes product = x * y;
        const auto is_finite = (Int64Lanes)(product - product == 0);
        sums[k] += (DoubleLanes)((Int64Lanes)product & is_finite);
        finite -= is_finite;
      }
    }
  }
  Products out;
  out.sum = lanes_total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  out.not_finite = sizeof(S) == 4 ? 0 : i - lanes_sum(finite);
  for (; i < n; ++i) {
    const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]);
    const bool is_number = sizeof(S) == 4 || is_finite(product);
    out.sum += is_number ? product : 0;
    out.not_finite += !is_number;
  }
  return out;
}

inline float root_of(float x) { return __builtin_sqrtf(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }

// The sums of the blocks of a chunk.
struct UpdateSums {
  Moments update;
  Products grad_momentum, update_grad, lag;
  int64_t small_variances = 0;
};

inline void add(Products& sum, const Products& products) {
  sum.sum += products.sum;
  sum.not_finite += products.not_finite;
}

template <DType kDType, class S>
inline int64_t count_lost(const S* w, const S* dw, int64_t n) {
  int32_t lost = 0;
  for (int64_t i = 0; i < n; ++i) lost += is_lost<kDType>(w[i], dw[i]);
  return lost;
}

template <class S>
inline int64_t count_lost(DType dtype, const S* w, const S* dw, int64_t n) {
  switch (dtype) {
    case DType::kFloat64: return count_lost<DType::kFloat64>(w, dw, n);
    case DType::kFloat32: return count_lost<DType::kFloat32>(w, dw, n);
    case DType::kBFloat16: return count_lost<DType::kBFloat16>(w, dw, n);
    default: return count_lost<DType::kFloat16>(w, dw, n);
  }
}

// Computes a block of n <= kUpdateBlock elements in S. Returns false, and leaves `out` as it was,
// if S is float and something is not finite.
template <class S>
inline bool try_update_block(const UpdateOperands& u, const StepConstants<S>& k, int64_t begin,
                             int64_t n, UpdateSums& out) {
  S* const buffers = reinterpret_cast<S*>(update_scratch());
  const BlockOperands<S> in = {load_operand(u.param, begin, n, buffers),
                               load_operand(u.old, begin, n, buffers + kUpdateBlock),
                               load_operand(u.grad, begin, n, buffers + 2 * kUpdateBlock),
                               load_operand(u.momentum, begin, n, buffers + 3 * kUpdateBlock),
                               load_operand(u.variance, begin, n, buffers + 4 * kUpdateBlock)};
  S* const dw = buffers + 5 * kUpdateBlock;
  S* const roots = buffers + 6 * kUpdateBlock;

  UpdateSums sums;
  if (in.variance != nullptr) {
    for (int64_t i = 0; i < n; ++i) roots[i] = root_of(in.variance[i]);
  }
  if (u.method == UpdateMethod::kFormula) {
    for (int64_t i = 0; i < n; ++i) dw[i] = formula(in.param[i], in.momentum[i], roots[i], k);
  } else if (u.method == UpdateMethod::kDifference) {
    for (int64_t i = 0; i < n; ++i) dw[i] = in.param[i] - in.old[i];
  }
  if (u.method != UpdateMethod::kNone) {
    sums.update = chunk<Native<S, typename LanesFor<S>::Type>>(dw, n);
    if (u.method == UpdateMethod::kFormula) {
      sums.update.zeros = count_lost(u.param.dtype, in.param, dw, n);
    }
    if (in.grad != nullptr) sums.update_grad = dot(dw, in.grad, n);
  }
  if (in.grad != nullptr && in.momentum != nullptr) {
    sums.grad_momentum = dot(in.grad, in.momentum, n);
  }
  if (in.grad != nullptr && in.variance != nullptr) {
    int32_t small = 0;
    for (int64_t i = 0; i < n; ++i) {
      small += in.variance[i] < k.least_variance;
      roots[i] = lag_root(in.grad[i], in.variance[i], roots[i], k);
    }
    sums.lag = dot(roots, roots, n);
    sums.small_variances = small;
  }
  if (sizeof(S) == 4 &&
      (finite_count(sums.update) != sums.update.count ||
       !is_finite(sums.update_grad.sum + sums.grad_momentum.sum + sums.lag.sum))) {
    return false;
  }
  out.update = merge(out.update, sums.update);
  add(out.update_grad, sums.update_grad);
  add(out.grad_momentum, sums.grad_momentum);
  add(out.lag, sums.lag);
  out.small_variances += sums.small_variances;
  return true;
}

inline bool is_double(const Operand& operand) {
  return operand.data != nullptr && operand.dtype == DType::kFloat64;
}

inline Moments row_of(const Products& products, int64_t n, double factor, int64_t zeros) {
  return row_of_products(n, products.not_finite, products.sum * factor, zeros);
}

void chunk_of_update(const UpdateOperands& u, int64_t begin, int64_t n, Moments* rows) {
  const bool has_double = is_double(u.param) || is_double(u.old) || is_double(u.grad) ||
                          is_double(u.momentum) || is_double(u.variance);
  UpdateSums sums;
  for (int64_t i = 0; i < n; i += kUpdateBlock) {
    const int64_t size = n - i < kUpdateBlock ? n - i : kUpdateBlock;
    if (has_double || !try_update_block(u, u.in_float, begin + i, size, sums)) {
      try_update_block(u, u.in_double, begin + i, size, sums);
    }
  }
  rows[kUpdate] = sums.update;
  rows[kGradMomentum] = row_of(sums.grad_momentum, n, 1, 0);
  rows[kUpdateGrad] = row_of(sums.update_grad, n, 1, 0);
  rows[kLag] = row_of(sums.lag, n, u.in_double.bc2, sums.small_variances);
}
