// The rows of an update (updates.h). A part of kernels_body.h, which includes it once per SIMD
// level and states the rules for its code.
//
// Elements are read in blocks of kUpdateBlock. Their arithmetic is float32 if all operands are
// float32 or narrower: dw, g / sqrt(v) and sqrt(v) are written to buffers in the cache, and the
// kernel of float32 summarizes dw. Products are summed in float64 lanes, where those of two float32
// are exact. A block that has anything which is not finite or too small for float32 is computed
// again in float64, like every block with an operand of float64.

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

inline FloatLanes root_of(FloatLanes v) {
#if defined(PARAMSTATS_SQRT_PS)
  return PARAMSTATS_SQRT_PS(v);
#else
  for (int l = 0; l < kLanes<FloatLanes>; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
#endif
}
inline DoubleLanes root_of(DoubleLanes v) {
#if defined(PARAMSTATS_SQRT_PD)
  return PARAMSTATS_SQRT_PD(v);
#else
  for (int l = 0; l < kLanes<DoubleLanes>; ++l) v[l] = __builtin_sqrt(v[l]);
  return v;
#endif
}

// A sum of products. A float32 block is only used if its sums are finite, so that only float64
// products need to be checked one by one.
struct Products {
  double sum = 0;
  int64_t not_finite = 0;

  void add(const Products& other) {
    sum += other.sum;
    not_finite += other.not_finite;
  }
};

// Products in float64 lanes, where those of two float32 are exact.
template <class L>
struct LaneProducts;
template <>
struct LaneProducts<InFloat> {
  DoubleLanes sums[2] = {};

  void add(FloatLanes a, FloatLanes b) {
    sums[0] += doubles<0>(a) * doubles<0>(b);
    sums[1] += doubles<1>(a) * doubles<1>(b);
  }
  Products total() const { return {lanes_total(sums[0] + sums[1]), 0}; }
};
template <>
struct LaneProducts<InDouble> {
  DoubleLanes sum = {};
  Int64Lanes not_finite = {};

  void add(DoubleLanes a, DoubleLanes b) {
    const DoubleLanes product = a * b;
    const auto wrong = (Int64Lanes)(product - product != 0);
    sum += (DoubleLanes)((Int64Lanes)product & ~wrong);
    not_finite -= wrong;
  }
  Products total() const { return {lanes_total(sum), lanes_sum(not_finite)}; }
};

// The sums of the vectors of a block.
template <class L>
struct UpdateLanes {
  LaneProducts<L> grad_momentum, update_grad, lag;
  typename L::Mask small_variances = {};
  typename L::Mask lost = {};  // if the parameter has the dtype of the lanes
};

// What a block computes. Loops without branches keep the sums in registers.
template <UpdateMethod kMethod_, bool kGrad_, bool kMomentum_, bool kVariance_>
struct Rows {
  static constexpr UpdateMethod kMethod = kMethod_;
  static constexpr bool kGrad = kGrad_, kMomentum = kMomentum_, kVariance = kVariance_;
};

// Adds one vector from element i on.
template <class R, class L, class S>
inline __attribute__((always_inline)) void take_operands(const BlockOperands<S>& in, int64_t i,
                                                         const StepConstants<S>& k, S* dw,
                                                         UpdateLanes<L>& out) {
  using V = typename L::Vector;
  V v = {}, root = {}, update = {};
  if constexpr (R::kVariance) {
    v = load_as<V>(in.variance + i);
    root = root_of(v);
  }
  if constexpr (R::kMethod != UpdateMethod::kNone) {
    const V w = load_as<V>(in.param + i);
    if constexpr (R::kMethod == UpdateMethod::kFormula) {
      typename L::Mask lost;
      formula(w, load_as<V>(in.momentum + i), root, k, update);
      is_lost_in_own_precision(w, update, lost);
      out.lost -= lost;
    } else {
      update = w - load_as<V>(in.old + i);
    }
    __builtin_memcpy(dw + i, &update, sizeof(update));
  }
  if constexpr (R::kGrad) {
    const V g = load_as<V>(in.grad + i);
    if constexpr (R::kMethod != UpdateMethod::kNone) out.update_grad.add(update, g);
    if constexpr (R::kMomentum) out.grad_momentum.add(g, load_as<V>(in.momentum + i));
    if constexpr (R::kVariance) {
      V q;
      lag_root(g, v, root, k, q);
      out.lag.add(q, q);
      out.small_variances -= (typename L::Mask)(v < k.least_variance);
    }
  }
}

// The n elements of an operand from `begin` on, padded to a vector with elements that change no
// sum.
template <class S, int kWidth>
inline const S* padded(const S* x, int64_t begin, int64_t n, double padding, S (&out)[kWidth]) {
  if (x == nullptr) return nullptr;
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<S>(padding);
  __builtin_memcpy(out, x + begin, n * sizeof(S));
  return out;
}

// Computes n elements. Writes dw.
template <class R, class L, class S>
__attribute__((noinline)) UpdateLanes<L> take_block(const BlockOperands<S> in, int64_t n,
                                                    const StepConstants<S> k, S* dw) {
  constexpr int kWidth = L::kWidth;
  UpdateLanes<L> lanes;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) take_operands<R>(in, i, k, dw, lanes);
  if (i < n) {
    const int64_t rest = n - i;
    S last[5][kWidth], last_dw[kWidth] = {};
    const BlockOperands<S> at_end = {
        padded(in.param, i, rest, 0, last[0]), padded(in.old, i, rest, 0, last[1]),
        padded(in.grad, i, rest, 0, last[2]), padded(in.momentum, i, rest, 0, last[3]),
        padded(in.variance, i, rest, kInfinity, last[4])};
    const auto lost = lanes.lost;
    take_operands<R>(at_end, 0, k, last_dw, lanes);
    for (int64_t l = rest; l < kWidth; ++l) lanes.lost[l] = lost[l];
    __builtin_memcpy(dw + i, last_dw, rest * sizeof(S));
  }
  return lanes;
}

template <UpdateMethod kMethod, class L, class S>
inline UpdateLanes<L> take_block_of(const BlockOperands<S>& in, int64_t n,
                                    const StepConstants<S>& k, S* dw) {
  constexpr bool kFormula = kMethod == UpdateMethod::kFormula;
  const bool has_momentum = in.momentum != nullptr, has_variance = in.variance != nullptr;
  if (in.grad == nullptr) {
    if constexpr (kMethod == UpdateMethod::kNone) return {};
    return take_block<Rows<kMethod, false, false, kFormula>, L>(in, n, k, dw);
  }
  if (kFormula || (has_momentum && has_variance)) {
    return take_block<Rows<kMethod, true, true, true>, L>(in, n, k, dw);
  }
  if constexpr (!kFormula) {
    if (has_momentum) return take_block<Rows<kMethod, true, true, false>, L>(in, n, k, dw);
    if (has_variance) return take_block<Rows<kMethod, true, false, true>, L>(in, n, k, dw);
    if (kMethod != UpdateMethod::kNone) {
      return take_block<Rows<kMethod, true, false, false>, L>(in, n, k, dw);
    }
  }
  return {};
}

// The sums of the blocks of a chunk.
struct UpdateSums {
  Moments update;
  Products grad_momentum, update_grad, lag;
  int64_t small_variances = 0;
};

template <DType kDType, class S>
inline int64_t count_lost(const S* w, const S* dw, int64_t n) {
  int32_t lost = 0;
  for (int64_t i = 0; i < n; ++i) lost += is_lost<kDType>(w[i], dw[i]);
  return lost;
}

// How many elements of a parameter of another dtype than S did not change.
template <class S>
inline int64_t count_lost(DType dtype, const S* w, const S* dw, int64_t n) {
  switch (dtype) {
    case DType::kBFloat16: return count_lost<DType::kBFloat16>(w, dw, n);
    case DType::kFloat16: return count_lost<DType::kFloat16>(w, dw, n);
    default: return count_lost<DType::kFloat32>(w, dw, n);
  }
}

inline bool is_tiny(double squares) { return squares > 0 && squares < kMinUpdateSquares; }

// Computes a block of n <= kUpdateBlock elements in the lanes L. Returns false, and leaves `out` as
// it was, if the lanes are float32 and cannot represent the results.
template <class L, class S>
inline bool try_update_block(const UpdateOperands& u, const StepConstants<S>& k, int64_t begin,
                             int64_t n, UpdateSums& out) {
  S* const buffers = reinterpret_cast<S*>(update_scratch());
  const BlockOperands<S> in = {load_operand(u.param, begin, n, buffers),
                               load_operand(u.old, begin, n, buffers + kUpdateBlock),
                               load_operand(u.grad, begin, n, buffers + 2 * kUpdateBlock),
                               load_operand(u.momentum, begin, n, buffers + 3 * kUpdateBlock),
                               load_operand(u.variance, begin, n, buffers + 4 * kUpdateBlock)};
  S* const dw = buffers + 5 * kUpdateBlock;
  UpdateLanes<L> lanes;
  Moments update;
  if (u.method == UpdateMethod::kNone) {
    lanes = take_block_of<UpdateMethod::kNone, L>(in, n, k, dw);
  } else if (u.method == UpdateMethod::kDifference) {
    lanes = take_block_of<UpdateMethod::kDifference, L>(in, n, k, dw);
    update = chunk<Native<S, L>>(dw, n);
  } else {
    lanes = take_block_of<UpdateMethod::kFormula, L>(in, n, k, dw);
    update = chunk<Native<S, L>>(dw, n);
    const bool has_own_dtype = element_size(u.param.dtype) == sizeof(S);
    update.zeros =
        has_own_dtype ? lanes_sum(lanes.lost) : count_lost(u.param.dtype, in.param, dw, n);
  }
  const Products grad_momentum = lanes.grad_momentum.total();
  const Products update_grad = lanes.update_grad.total(), lag = lanes.lag.total();
  const double squares = update.m2 + update.count * update.mean * update.mean;
  if (sizeof(S) == 4 &&
      (finite_count(update) != update.count || is_tiny(squares) ||
       !is_finite(grad_momentum.sum + update_grad.sum + lag.sum) || is_tiny(lag.sum))) {
    return false;
  }
  out.update = merge(out.update, update);
  out.grad_momentum.add(grad_momentum);
  out.update_grad.add(update_grad);
  out.lag.add(lag);
  out.small_variances += lanes_sum(lanes.small_variances);
  return true;
}

inline bool is_double(const Operand& operand) {
  return operand.data != nullptr && operand.dtype == DType::kFloat64;
}

inline Moments row_of(const Products& products, int64_t n, double factor, int64_t zeros) {
  // With constants that are not finite, the padding of the last vector is not finite either.
  const int64_t not_finite = products.not_finite < n ? products.not_finite : n;
  return row_of_products(n, not_finite, products.sum * factor, zeros);
}

void chunk_of_update(const UpdateOperands& u, int64_t begin, int64_t n, Moments* rows) {
  const bool has_double = is_double(u.param) || is_double(u.old) || is_double(u.grad) ||
                          is_double(u.momentum) || is_double(u.variance);
  const bool fits_float = !has_double && u.in_float.fit;
  UpdateSums sums;
  for (int64_t i = 0; i < n; i += kUpdateBlock) {
    const int64_t size = n - i < kUpdateBlock ? n - i : kUpdateBlock;
    if (!fits_float || !try_update_block<InFloat>(u, u.in_float, begin + i, size, sums)) {
      try_update_block<InDouble>(u, u.in_double, begin + i, size, sums);
    }
  }
  rows[kUpdate] = sums.update;
  rows[kGradMomentum] = row_of(sums.grad_momentum, n, 1, 0);
  rows[kUpdateGrad] = row_of(sums.update_grad, n, 1, 0);
  rows[kLag] = row_of(sums.lag, n, u.in_double.bc2, sums.small_variances);
}
