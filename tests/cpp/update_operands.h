// The operands of an update as tensors of any dtype, and the check of its rows at every SIMD level.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "check.h"
#include "tensor.h"
#include "updates_oracle.h"

namespace paramstats::test {

constexpr DType kDTypesOfUpdates[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                      DType::kFloat16};
constexpr oracle::Step kStep = {1e-3, 0.1, 0.9, 0.999, 1e-8, 3};
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

inline Hyperparameters hyperparameters(const oracle::Step& s) {
  return {s.lr, s.decay, s.beta1, s.beta2, s.eps};
}

// The bits of a value, rounded towards zero.
inline uint64_t encode(DType dtype, double value) {
  uint64_t bits = 0;
  if (dtype == DType::kFloat64) {
    std::memcpy(&bits, &value, sizeof(value));
    return bits;
  }
  const oracle::FloatFormat f = oracle::float_format(dtype);
  const uint64_t infinity = ((uint64_t{1} << f.exponent_bits) - 1) << f.mantissa_bits;
  const uint64_t sign = std::signbit(value) ? oracle::sign_bit(dtype) : 0;
  if (std::isnan(value)) return infinity | 1;
  if (std::isinf(value)) return infinity | sign;
  uint64_t low = 0, high = infinity;  // magnitudes grow with their bits
  while (high - low > 1) {
    const uint64_t middle = (low + high) / 2;
    (oracle::decode(dtype, middle) <= std::fabs(value) ? low : high) = middle;
  }
  return low | sign;
}

template <class Value>
Tensor tensor_of_values(DType dtype, int64_t n, Value value_at, int64_t first = 0) {
  Tensor t(dtype, n, first);
  t.fill([&](int64_t i) { return encode(dtype, value_at(i - first)); });
  return t;
}

// The tensors of an update, in the order of cpu::Update::tensors; then the copy of the parameter.
struct Operands {
  Tensor param, grad, momentum, variance, old;
  UpdateMethod method = UpdateMethod::kFormula;
  oracle::Step step = kStep;
  bool has_grad = true, has_momentum = true, has_variance = true;

  cpu::Update update(Moments* rows) const {
    const auto operand = [](const Tensor& t) {
      return cpu::Operand{t.numel() == 0 ? "empty" : static_cast<const void*>(t.data()), t.dtype};
    };
    cpu::Update u = {{}, param.numel(), {0, 1, 2, 3}, rows};
    u.operands.param = operand(param);
    if (has_grad) u.operands.grad = operand(grad);
    if (has_momentum) u.operands.momentum = operand(momentum);
    if (has_variance) u.operands.variance = operand(variance);
    if (method == UpdateMethod::kDifference) u.operands.old = operand(old);
    u.operands.method = method;
    u.operands.in_float = step_constants<float>(hyperparameters(step), step.step);
    u.operands.in_double = step_constants<double>(hyperparameters(step), step.step);
    return u;
  }
  bool in_double() const {
    return param.dtype == DType::kFloat64 || (has_grad && grad.dtype == DType::kFloat64) ||
           (has_momentum && momentum.dtype == DType::kFloat64) ||
           (has_variance && variance.dtype == DType::kFloat64) ||
           (method == UpdateMethod::kDifference && old.dtype == DType::kFloat64);
  }
};

// The elements of a trained parameter and its state.
inline Operands typical(DType param, DType grad, DType momentum, DType variance, int64_t n,
                        int64_t first = 0) {
  std::vector<double> w(n + 1), g(n + 1);
  for (int64_t i = 0; i < n; ++i) w[i] = 0.5 * noise(), g[i] = 0.01 * noise();
  const auto at = [](const std::vector<double>& x) {
    return [&x](int64_t i) { return i < 0 ? 0.0 : x[i]; };
  };
  return {
      tensor_of_values(param, n, at(w), first), tensor_of_values(grad, n, at(g), first),
      tensor_of_values(
          momentum, n, [&](int64_t i) { return 0.003 * noise() + at(g)(i) / 3; }, first),
      tensor_of_values(
          variance, n,
          [](int64_t i) { return i % 7 ? 1e-4 * noise() * noise() * (i % 2 ? 1 : -1) : 0; }, first),
      tensor_of_values(
          param, n, [&](int64_t i) { return at(w)(i) + (i % 3 ? 2e-3 * noise() : 0); }, first)};
}

struct States {
  std::vector<Moments> tensors = std::vector<Moments>(4);
  std::vector<Moments> rows = std::vector<Moments>(kUpdateRows);
};

inline States states_of(const Operands& o, const cpu::Kernels& kernels, cpu::Pool pool = nullptr) {
  States s;
  std::vector<Moments*> out;
  for (Moments& state : s.tensors) out.push_back(&state);
  cpu::summarize({o.param.view(), o.grad.view(), o.momentum.view(), o.variance.view()}, out,
                 kernels, pool, {o.update(s.rows.data())});
  return s;
}

inline void check_row(const Moments& got, const std::vector<long double>& products, double bound,
                      bool is_present) {
  if (!is_present) {
    CHECK(got.count, kAbsent);
    CHECK(is_unread(got), true);
    return;
  }
  oracle::check_products(got, oracle::truth_of_products(products), bound);
}

inline void check_update(const std::string& what, const Operands& o) {
  const int64_t n = o.param.numel();
  const auto w = o.param.values(), g = o.grad.values(), m = o.momentum.values(),
             v = o.variance.values(), old = o.old.values();
  std::vector<double> dw(n);
  std::vector<long double> gm(n), ug(n), lag(n);
  int64_t lost = 0, unclear = 0, small = 0;
  const bool by_formula = o.method == UpdateMethod::kFormula;
  const double bound = o.in_double() ? 1e-12 : 1e-6;
  for (int64_t i = 0; i < n; ++i) {
    const long double exact = by_formula ? oracle::adamw_update(w[i], m[i], v[i], o.step)
                                         : static_cast<long double>(w[i]) - old[i];
    dw[i] = static_cast<double>(exact);
    gm[i] = static_cast<long double>(g[i]) * m[i];
    ug[i] = exact * g[i];
    lag[i] = oracle::squared_lag(g[i], v[i], o.step);
    small += v[i] / oracle::bias_correction(o.step.beta2, o.step.step) <
             static_cast<long double>(o.step.eps) * o.step.eps;
    if (!by_formula || !std::isfinite(dw[i])) continue;
    if (o.param.dtype == DType::kFloat64) {
      lost += static_cast<double>(w[i] - exact) == w[i];
      continue;
    }
    const uint64_t bits = encode(o.param.dtype, w[i]);
    const double slack = bound * (std::fabs(dw[i]) + 1e-3 * std::fabs(w[i]));
    const bool low = oracle::is_lost(o.param.dtype, bits, dw[i] - slack);
    const bool high = oracle::is_lost(o.param.dtype, bits, dw[i] + slack);
    lost += low && high;
    unclear += low != high;
  }
  for (const cpu::Kernels* kernels : cpu::available_kernels()) {
    check::at(std::string(kernels->name) + " " + what + " " + name_of(o.param.dtype) + " " +
              name_of(o.grad.dtype) + " " + name_of(o.momentum.dtype) + " " +
              name_of(o.variance.dtype) + " n=" + std::to_string(n));
    const States got = states_of(o, *kernels);
    const bool has_update = o.method != UpdateMethod::kNone;
    if (has_update) {
      auto truth = oracle::truth_of(dw);
      const Moments& update = got.rows[kUpdate];
      if (by_formula) {
        CHECK(update.zeros >= lost && update.zeros <= lost + unclear, true);
        truth.exact.zeros = update.zeros;
      }
      if (finite_count(update) > 0) {  // dw is rounded to float32
        CHECK_NEAR(update.min, truth.exact.min, bound * std::fabs(truth.exact.min));
        CHECK_NEAR(update.max, truth.exact.max, bound * std::fabs(truth.exact.max));
        truth.exact.min = update.min;
        truth.exact.max = update.max;
      }
      if (update.min == update.max) truth.exact.mean = update.mean;
      oracle::check_state(update, truth, {bound, bound, 10 * bound});
    } else {
      check_row(got.rows[kUpdate], {}, 0, false);
    }
    check_row(got.rows[kGradMomentum], gm, 1e-12, o.has_grad && o.has_momentum);
    check_row(got.rows[kUpdateGrad], ug, bound, o.has_grad && has_update);
    check_row(got.rows[kLag], lag, bound, o.has_grad && o.has_variance);
    if (o.has_grad && o.has_variance) CHECK(got.rows[kLag].zeros, small);
    CHECK(got.rows[kGradMomentum].zeros + got.rows[kUpdateGrad].zeros, 0);
    // The states of the tensors are those of a call without updates.
    const auto alone = cpu_states({o.param, o.grad, o.momentum, o.variance}, *kernels);
    for (int t = 0; t < 4; ++t) CHECK(oracle::same_bits(got.tensors[t], alone[t]), true);
  }
}

}  // namespace paramstats::test
