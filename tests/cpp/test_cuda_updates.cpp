// Tests of the updates of the CUDA backend. A part of test_cuda_kernels.cpp.
#include <cfloat>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_call.h"
#include "updates_oracle.h"

namespace paramstats::test {
namespace {

using cuda::kGrad;
using cuda::kMomentum;
using cuda::kOld;
using cuda::kOperands;
using cuda::kVariance;
using cuda::kWeight;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr DType kNone = DType::kBool;  // no operand
constexpr int64_t kChunk = cuda::kSmallChunk / 8;
constexpr oracle::Step kAdam = {1e-3, 0.1, 0.9, 0.999, 1e-8, 7};
constexpr auto kFormula = UpdateMethod::kFormula;
constexpr auto kDifference = UpdateMethod::kDifference;

uint64_t bits_of_value(DType dtype, double x) {
  if (dtype == DType::kFloat64) return cuda_shim::bits<uint64_t>(x);
  if (dtype == DType::kFloat16) return cuda_shim::half_bits(static_cast<float>(x));
  const uint32_t bits = cuda_shim::bits<uint32_t>(static_cast<float>(x));
  return dtype == DType::kBFloat16 ? bits >> 16 : bits;
}

// An update whose operands have given dtypes (kNone: missing) and elements like those of Adam.
struct Operands {
  std::vector<Tensor> tensors;
  bool has[kOperands];
  UpdateMethod method;
  oracle::Step step = kAdam;

  Operands(UpdateMethod method, const DType (&dtypes)[kOperands], int64_t n, int64_t first = 0)
      : method(method) {
    for (int k = 0; k < kOperands; ++k) {
      has[k] = dtypes[k] != kNone;
      tensors.emplace_back(has[k] ? dtypes[k] : DType::kFloat32, has[k] ? n : 0, first);
    }
    fill(kWeight, [](int64_t) { return noise(); });
    fill(kGrad, [](int64_t) { return 0.01 * noise(); });
    fill(kMomentum, [](int64_t) { return 0.001 + 0.01 * noise(); });
    fill(kVariance, [](int64_t i) { return i % 9 == 4 ? 0 : 1e-4 * std::exp(noise()); });
    if (!has[kOld]) return;
    fill(kOld, [&](int64_t i) {  // every fifth element did not change
      uint64_t bits = 0;
      const Tensor& w = tensors[kWeight];
      const int64_t size = element_size(w.dtype);
      std::memcpy(&bits, w.memory.data() + i * size, size);
      return oracle::decode(w.dtype, bits) + (i % 5 ? 1e-3 * noise() : 0);
    });
  }

  template <class ValueAt>
  void fill(int k, ValueAt value_at) {
    if (!has[k]) return;
    const DType dtype = tensors[k].dtype;
    tensors[k].fill([&](int64_t i) { return bits_of_value(dtype, value_at(i)); });
  }
  void set(int k, int64_t i, double x) {
    tensors[k].set(tensors[k].first + i, bits_of_value(tensors[k].dtype, x));
  }

  cuda::UpdateView view() const {
    cuda::UpdateView out{};
    for (int k = 0; k < kOperands; ++k) {
      out.operands[k] = {has[k] ? tensors[k].data() : nullptr, tensors[k].dtype};
    }
    out.method = method;
    out.numel = tensors[kWeight].numel();
    out.hyperparameters = {step.lr, step.decay, step.beta1, step.beta2, step.eps};
    out.step = step.step;
    return out;
  }

  double bound() const {
    for (int k = 0; k < kOperands; ++k) {
      const bool is_read = has[k] && (k != kOld || method == kDifference);
      if (is_read && tensors[k].dtype == DType::kFloat64) return 1e-12;
    }
    return 1e-6;
  }

  void check() const { check_rows(run({}, {view()})); }

  // Checks the rows that the update has.
  void check_rows(const std::vector<Moments>& rows) const {
    size_t next = 0;
    if (method != UpdateMethod::kNone) check_change(rows.at(next++));
    if (has[kGrad] && has[kMomentum]) {
      check_products(rows.at(next++), [](const Element& x) { return x.grad * x.momentum; });
    }
    if (has[kGrad] && method != UpdateMethod::kNone) {
      check_products(rows.at(next++), [](const Element& x) { return x.change * x.grad; });
    }
    if (has[kGrad] && has[kVariance]) {
      int64_t small = 0;
      for (const Element& x : elements()) {
        small += x.variance / oracle::bias_correction(step.beta2, step.step) <
                 static_cast<long double>(step.eps) * step.eps;
      }
      CHECK(rows.at(next).zeros, small);
      check_products(rows.at(next++), [this](const Element& x) {
        return oracle::squared_lag(static_cast<double>(x.grad), static_cast<double>(x.variance),
                                   step);
      });
    }
    CHECK(next, rows.size());
  }

 private:
  struct Element {
    double weight;
    uint64_t bits;  // of the weight
    long double grad, momentum, variance, change;
  };

  std::vector<Element> elements() const {
    std::vector<double> x[kOperands];
    for (int k = 0; k < kOperands; ++k) {
      x[k] = has[k] ? tensors[k].values() : std::vector<double>(tensors[kWeight].numel());
    }
    std::vector<Element> out;
    for (int64_t i = 0; i < tensors[kWeight].numel(); ++i) {
      const long double change =
          method == kFormula
              ? oracle::adamw_update(x[kWeight][i], x[kMomentum][i], x[kVariance][i], step)
              : static_cast<long double>(x[kWeight][i]) - x[kOld][i];
      out.push_back({x[kWeight][i], bits_of_value(tensors[kWeight].dtype, x[kWeight][i]),
                     x[kGrad][i], x[kMomentum][i], x[kVariance][i], change});
    }
    return out;
  }

  void check_change(const Moments& got) const {
    std::vector<double> changes;
    int64_t unchanged = 0, unclear = 0;  // the latter depend on the rounding of dw
    long double largest = 0;
    const DType dtype = tensors[kWeight].dtype;
    for (const Element& x : elements()) {
      const auto change = static_cast<double>(x.change);
      changes.push_back(change);
      if (!std::isfinite(change)) continue;
      const double size = std::fabs(change) + step.lr * step.decay * std::fabs(x.weight);
      largest = std::fmax(largest, size);
      const auto is_unchanged = [&](long double dw) {
        if (method == kDifference) return change == 0;
        if (dtype == DType::kFloat64) return static_cast<double>(x.weight - dw) == x.weight;
        return oracle::is_lost(dtype, x.bits, static_cast<double>(dw));
      };
      const double slack = bound() * size;
      const bool low = is_unchanged(x.change - slack), high = is_unchanged(x.change + slack);
      unchanged += low && high;
      unclear += low != high;
    }
    oracle::Truth truth = oracle::truth_of(changes);
    CHECK(got.zeros >= unchanged && got.zeros <= unchanged + unclear, true);
    truth.exact.zeros = got.zeros;
    if (truth.n > 0) {  // dw is rounded
      CHECK_NEAR(got.min, truth.exact.min, bound() * largest);
      CHECK_NEAR(got.max, truth.exact.max, bound() * largest);
      truth.exact.min = got.min;
      truth.exact.max = got.max;
      if (got.min == got.max) truth.exact.mean = got.mean;
    }
    oracle::check_state(got, truth, {bound(), bound(), 10 * bound()});
  }

  template <class Product>
  void check_products(const Moments& got, Product product) const {
    std::vector<long double> products;
    for (const Element& x : elements()) products.push_back(product(x));
    oracle::check_products(got, oracle::truth_of_products(products), bound());
  }
};

constexpr DType F64 = DType::kFloat64, F32 = DType::kFloat32, B16 = DType::kBFloat16,
                F16 = DType::kFloat16;

const DType kMixes[][kOperands] = {
    {F32, F32, F32, F32, F32}, {B16, B16, B16, B16, B16}, {F16, F16, F16, F16, F16},
    {F64, F64, F64, F64, F64}, {B16, F32, F32, F32, B16}, {F32, B16, F32, F32, F32},
    {F32, F16, B16, F32, F32}, {F16, F16, F32, F32, F16}, {F32, F32, F64, F32, F32},
    {F64, F32, F32, B16, F64}, {B16, B16, F32, F64, B16}, {F32, F32, F32, F32, F64},
};

std::string names_of(const DType (&mix)[kOperands]) {
  std::string name;
  for (DType dtype : mix) name += (dtype == kNone ? "none" : name_of(dtype)) + " ";
  return name;
}

// ---- values ------------------------------------------------------------------------------------

void rows_of_all_sizes_at_all_addresses() {
  for (const auto& mix : kMixes) {
    for (UpdateMethod method : {kFormula, kDifference}) {
      for (int64_t first : {0, 1, 2, 4}) {
        for (int64_t n :
             {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{5}, int64_t{7}, int64_t{127},
              int64_t{511}, int64_t{513}, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 17}) {
          if (n > 1000 && first > 1) continue;
          check::at(names_of(mix) + std::to_string(n) + "+" + std::to_string(first));
          Operands(method, mix, n, first).check();
        }
      }
    }
  }
}

// A row that lacks an operand is not in the results.
void missing_operands() {
  for (int missing = 0; missing < 1 << (kOperands - 1); ++missing) {
    for (UpdateMethod method : {UpdateMethod::kNone, kFormula, kDifference}) {
      DType dtypes[kOperands] = {F32, F32, B16, F32, F32};
      for (int k = 1; k < kOperands; ++k) {
        if (missing >> (k - 1) & 1) dtypes[k] = kNone;
      }
      const bool is_formula = method == kFormula;
      if (is_formula && (dtypes[kMomentum] == kNone || dtypes[kVariance] == kNone)) continue;
      if (method == kDifference && dtypes[kOld] == kNone) continue;
      for (int64_t n : {int64_t{5}, 2 * kChunk + 9}) {
        const Operands update(method, dtypes, n);
        check::at(std::to_string(missing) + " method " + std::to_string(static_cast<int>(method)));
        const Tensor other(F64, 3);
        std::vector<Moments> rows = run({view_of(other)}, {update.view()});
        oracle::check_state(rows[0], oracle::truth_of(other.values()), oracle::kDoubleLanes);
        rows.erase(rows.begin());
        update.check_rows(rows);
      }
    }
  }
}

void the_step_may_be_on_the_device() {
  Operands update(kFormula, kMixes[0], 100);
  for (int step : {1, 2, 1000, 100000}) {
    update.step.step = step;
    const std::vector<Moments> want = run({}, {update.view()});
    update.check_rows(want);
    for (DType dtype : {F32, F64, DType::kInt64, DType::kInt32}) {
      Tensor on_device(dtype, 1);
      on_device.set(0, dtype == F32 || dtype == F64 ? bits_of_value(dtype, step) : step);
      cuda::UpdateView view = update.view();
      view.step_tensor = {on_device.data(), dtype};
      view.step = kNaN;
      const std::vector<Moments> got = run({}, {view});
      check::at("step " + std::to_string(step) + " as " + name_of(dtype));
      for (int row = 0; row < kUpdateRows; ++row) {
        CHECK(oracle::same_bits(got.at(row), want.at(row)), true);
      }
    }
  }
}

// What float32 cannot represent, though float64 can, and what neither can.
void elements_that_need_the_exact_path() {
  const struct {
    const char* name;
    UpdateMethod method;
    int operand;
    double value;
  } kCases[] = {
      {"NaN weight", kFormula, kWeight, kNaN},
      {"NaN weight", kDifference, kWeight, kNaN},
      {"NaN grad", kFormula, kGrad, kNaN},
      {"NaN momentum", kFormula, kMomentum, kNaN},
      {"NaN variance", kFormula, kVariance, kNaN},
      {"negative variance", kFormula, kVariance, -1},
      {"infinite old", kDifference, kOld, kInf},
      {"infinite old", kDifference, kOld, -kInf},
      {"infinite grad", kFormula, kGrad, -kInf},
      {"infinite momentum", kFormula, kMomentum, kInf},
      {"infinite variance", kFormula, kVariance, kInf},
      {"large difference", kDifference, kOld, -3e38},
      {"large momentum", kFormula, kMomentum, 3e38},
      {"large grad", kFormula, kGrad, 3e38},
  };
  for (const auto& c : kCases) {
    for (DType dtype : {F32, F64}) {
      for (int64_t at : {int64_t{0}, int64_t{1}, 2 * kChunk - 3, 2 * kChunk, 2 * kChunk + 4}) {
        const DType mix[kOperands] = {dtype, F32, F32, dtype, F32};
        Operands update(c.method, mix, 2 * kChunk + 5, 1);
        if (c.value == -3e38) update.set(kWeight, at, 3e38);  // the difference is 6e38
        if (c.value == 3e38) update.set(kVariance, at, 0);    // a quotient above 3.4e38
        update.set(c.operand, at, c.value);
        check::at(std::string(c.name) + " at " + std::to_string(at));
        update.check();
      }
    }
  }
  Operands all_nan(kFormula, kMixes[0], 100);
  all_nan.fill(kGrad, [](int64_t) { return kNaN; });
  all_nan.fill(kMomentum, [](int64_t i) { return i % 2 ? kInf : kNaN; });
  check::at("all NaN");
  all_nan.check();
}

void tiny_and_distant_elements() {
  for (DType dtype : {F32, F64}) {
    const DType mix[kOperands] = {dtype, F32, F32, F32, dtype};
    Operands update(kDifference, mix, 3 * kChunk);
    const auto check_as = [&](const char* name) {
      check::at(std::string(name) + " " + name_of(dtype));
      update.check();
    };
    const auto set_change = [&](double (*weight)(int64_t), double (*old)(int64_t)) {
      update.fill(kWeight, weight);
      update.fill(kOld, old);
    };
    set_change([](int64_t) { return 1e-42 * noise(); }, [](int64_t) { return 0.0; });
    check_as("subnormal changes");
    set_change([](int64_t i) { return i % kChunk == 0 ? 1e6 : 1e-3 * noise(); },
               [](int64_t) { return 0.0; });
    check_as("a distant first element");
    set_change([](int64_t) { return 1000 + 1e-3 * noise(); }, [](int64_t) { return 0.0; });
    check_as("a large mean");
    set_change([](int64_t i) { return i % kChunk == 0 ? 1e12 : 0.02 * noise(); },
               [](int64_t i) { return i % kChunk == 0 ? 0.0 : -1000; });
    check_as("a distant first element and a large mean");
    set_change([](int64_t) { return 0.5; }, [](int64_t) { return 0.125; });
    check_as("constant");
    const Moments constant = run({}, {update.view()})[kUpdate];
    CHECK(constant.mean, 0.375);
    CHECK(constant.m2, 0);
    set_change([](int64_t) { return 0.5; }, [](int64_t) { return 0.5; });
    check_as("no change");
    const Moments unchanged = run({}, {update.view()})[kUpdate];
    CHECK(unchanged.zeros, 3 * kChunk);
  }
  Operands small(kFormula, {F32, F32, F32, F32, kNone}, 2 * kChunk);
  small.fill(kWeight, [](int64_t) { return 0; });
  small.step.lr = 1e-41;
  check::at("a learning rate below those of float32");
  small.check();
  small.fill(kGrad, [](int64_t) { return 1e-30 * noise(); });
  small.fill(kVariance, [](int64_t) { return 1e20; });
  check::at("quotients below those of float32");
  small.check();
}

// A chunk is read element by element only if it must be.
void number_of_reads_of_an_update() {
  const auto loads_per_element = [](const Operands& update) {
    const int64_t before = cuda_shim::loads;
    run({}, {update.view()});
    return static_cast<double>(cuda_shim::loads - before) / kChunk;
  };
  Operands update(kFormula, kMixes[0], kChunk);  // with five operands, one of them unused
  CHECK_NEAR(loads_per_element(update), 4 * 0.25, 0.2);
  const Operands misaligned(kFormula, kMixes[0], kChunk, 1);
  CHECK_NEAR(loads_per_element(misaligned), 4, 0.2);
  Operands difference(kDifference, {B16, B16, kNone, kNone, B16}, kChunk);
  CHECK_NEAR(loads_per_element(difference), 3 * 0.25, 0.2);
  difference.set(kOld, 0, 1e9);  // the pivot
  CHECK_NEAR(loads_per_element(difference), 3 * 0.25, 0.2);
  update.set(kGrad, 9, kNaN);  // four rows more, each of which loads all operands
  CHECK_NEAR(loads_per_element(update), 4 * 0.25 + 16, 0.2);
}

// ---- lost updates ------------------------------------------------------------------------------

// With these, dw = -m.
constexpr oracle::Step kMinusMomentum = {1, 0, 0, 0, 0, 1};

// w - dw is in the middle of two values, just below it or just above it. Ties go to the even one.
void updates_that_are_lost_in_rounding() {
  for (DType dtype : {F32, B16, F16, F64}) {
    const int digits = oracle::float_format(dtype).mantissa_bits;
    const double step = std::ldexp(1, -digits);  // of values in [1, 2)
    const DType moment = dtype == F64 || dtype == F32 ? F64 : F32;
    const double tiny = dtype == F64 ? 0x1p-50 : 0x1p-20, less = 1 - tiny, more = 1 + tiny;
    const struct {
      double weight, change;
      bool is_lost;
    } kCases[] = {
        {1, 0, true},
        {1, -step / 2, true},  // w - dw = 1 + step / 2: ties to 1, which is even
        {1, -step / 2 * less, true},
        {1, -step / 2 * more, false},
        {1, step / 4, true},  // below 1 steps are half as large
        {1, step / 4 * more, false},
        {1, step / 2, false},
        {-1, step / 2, true},
        {-1, -step / 4 * more, false},
        {1 + step, step / 2, false},  // ties away from the odd 1 + step
        {1 + step, step / 2 * less, true},
        {1 + step, -step / 2, false},
        {1 + 2 * step, step / 2, true},
        {0, 0, true},
        {0, step, false},
        {0, -0x1p-100, dtype == F16},  // below half of the smallest float16
    };
    for (const auto& c : kCases) {
      for (int64_t n : {1, 4, 7}) {
        Operands update(kFormula, {dtype, kNone, moment, F32, kNone}, n);
        update.step = kMinusMomentum;
        update.fill(kWeight, [&](int64_t) { return c.weight; });
        update.fill(kMomentum, [&](int64_t) { return -c.change; });
        update.fill(kVariance, [](int64_t) { return 1; });
        check::at(name_of(dtype) + " " + std::to_string(c.weight) + " changed by " +
                  std::to_string(c.change / step) + " steps");
        const Moments got = run({}, {update.view()}).at(kUpdate);
        CHECK(got.mean, c.change);
        CHECK(got.zeros, c.is_lost ? n : 0);
      }
    }
  }
}

// ---- chunks, rows and the table ----------------------------------------------------------------

void results_do_not_depend_on_the_schedule_or_the_other_updates() {
  std::vector<Operands> updates;
  Views views;
  Tensors tensors;
  Updates all;
  for (const auto& mix : kMixes) {
    updates.emplace_back(kFormula, mix, 2 * kChunk + 1001, 1);
    updates.emplace_back(kDifference, mix, 2 * kChunk + 8);
    updates.emplace_back(kDifference, mix, 37);
    tensors.emplace_back(mix[0], 3 * kChunk);
  }
  for (const Operands& update : updates) all.push_back(update.view());
  for (const Tensor& t : tensors) views.push_back(view_of(t));
  const std::vector<Moments> want = run(views, all), alone = run(views);
  for (uint64_t seed = 1; seed < 4; ++seed) {
    cuda_shim::set_seed(seed);
    const std::vector<Moments> got = run(views, all);
    check::at("seed " + std::to_string(seed));
    for (size_t i = 0; i < want.size(); ++i) CHECK(oracle::same_bits(got[i], want[i]), true);
  }
  size_t next = 0;
  for (; next < alone.size(); ++next) CHECK(oracle::same_bits(alone[next], want[next]), true);
  for (const cuda::UpdateView& view : all) {
    for (const Moments& row : run({}, {view})) CHECK(oracle::same_bits(row, want[next++]), true);
  }
  CHECK(next, want.size());
}

// With large chunks, and with several groups of them.
void large_updates() {
  for (int64_t n : {cuda::kLargeTensor / 8 - 1, cuda::kLargeTensor / 8,
                    int64_t{34} * cuda::kLargeChunk / 8 + 5}) {
    Operands update(kFormula, {B16, B16, F32, F32, kNone}, n);
    // The sums depend on every chunk.
    update.fill(kMomentum, [](int64_t i) { return static_cast<double>(i / 1000) * 1e-3; });
    check::at(std::to_string(n));
    update.check();
  }
}

// Update u changes all elements by u + 1, which identifies it, as do its gradients and moments.
void every_update_finds_its_chunks_and_rows() {
  for (int64_t updates : {1, 2, 31, 32, 33, 168, 400}) {
    for (int64_t tensors : {0, 1, 170}) {
      std::vector<Operands> operands;
      Updates views;
      for (int64_t u = 0; u < updates; ++u) {
        const int64_t n = u % 7 == 3 ? kChunk + u : u % 150 == 140 ? 33 * kChunk + 5 : u % 20 + 1;
        const bool has_grad = u % 3 != 1;
        operands.push_back({u % 2 ? kDifference : UpdateMethod::kNone,
                            {F32, has_grad ? F32 : kNone, F32, kNone, F32},
                            n});
        const auto value = static_cast<double>(u + 1);
        operands.back().fill(kWeight, [=](int64_t) { return value; });
        operands.back().fill(kOld, [](int64_t) { return 0; });
        operands.back().fill(kGrad, [=](int64_t) { return 2 * value; });
        operands.back().fill(kMomentum, [=](int64_t) { return 2; });
        views.push_back(operands.back().view());
      }
      const Tensor t(F32, kChunk / 2);
      const Counts counts;
      const std::vector<Moments> rows = run(Views(tensors, view_of(t)), views);
      counts.check((tensors > 0) + 1 + (updates > 3), 1);
      size_t next = tensors;
      for (int64_t u = 0; u < updates; ++u) {
        const int64_t n = views[u].numel;
        const auto value = static_cast<double>(u + 1);
        check::at("update " + std::to_string(u) + " of " + std::to_string(updates) + " after " +
                  std::to_string(tensors) + " tensors");
        if (u % 2) {
          const Moments want = {n, 0, 0, 0, 0, value, 0, value, value};
          CHECK(oracle::same_bits(rows[next++], want), true);
        }
        if (u % 3 == 1) continue;
        const Moments products = {n, 0, 0, 0, 0, 4 * value, 0, 0, 0};
        CHECK(oracle::same_bits(rows[next++], products), true);
        if (u % 2) CHECK(rows[next++].mean, 2 * value * value);
      }
      CHECK(next, rows.size());
    }
  }
}

void memory_that_updates_need() {
  const auto check = [](int64_t tensors, int64_t numel, int64_t host, int64_t device) {
    cuda::UpdateView view{};
    view.numel = numel;
    view.method = kDifference;
    for (int k : {kWeight, kGrad, kOld}) view.operands[k].data = &view;
    const Views views(tensors, {nullptr, 8, DType::kInt8});
    const cuda::Sizes sizes = cuda::sizes(inputs_of(views, {view}));
    check::at(std::to_string(tensors) + " and " + std::to_string(numel));
    CHECK(sizes.host, host);
    CHECK(sizes.device, device);
  };
  constexpr int64_t kUpdate = sizeof(cuda::UpdateEntry);
  check(0, 8, 2 * (72 + 24) + kUpdate, 2 * 24 + kUpdate);
  constexpr int64_t kZeroRows = 24 + 8;  // of a tensor of one chunk
  check(1, 8, 3 * (72 + 24) + kZeroRows + kUpdate, 3 * 24 + kUpdate);
  check(1, kChunk + 1, 3 * (72 + 24) + kZeroRows + kUpdate,
        3 * 24 + 16 + kUpdate + (1 + 2 * 2) * 72);
}

void updates_that_the_kernels_cannot_read() {
  const Counts counts;
  Operands update(kFormula, kMixes[0], 10);
  cuda::UpdateView view = update.view();
  view.numel = 0;
  CHECK(Call({}, 0, nullptr, {update.view(), view}).error,
        std::string("expected tensors with elements, of at most 2147483647 chunks in all, got 0 "
                    "elements in update 1 after 4 chunks"));
  // Four rows have 2^31 chunks or more, of which no memory is touched.
  view.numel = int64_t{1} << (29 + 14);
  PinnedMemory host(1000);
  CHECK(cuda::enqueue(0, {nullptr, 0, &view, 1}, host.bytes, nullptr, nullptr).empty(), false);
  counts.check(0, 0);
}

void errors_of_calls_with_updates() {
  const Operands update(kFormula, kMixes[0], kChunk + 1);
  const Tensor t(F32, 10);
  const std::vector<std::string> functions = {
      "cuCtxPushCurrent_v2",  "cuMemHostGetDevicePointer_v2",
      "cuMemcpyHtoDAsync_v2", "cuLaunchKernel",
      "cuLaunchKernel",       "cuLaunchKernel"};
  for (size_t skip = 0; skip < functions.size(); ++skip) {
    const Counts counts;
    cuda_shim::fail_next(cudaErrorUnknown, static_cast<int>(skip));
    const Call call({view_of(t)}, 0, nullptr, {update.view()});
    check::at(functions[skip]);
    CHECK(call.error, functions[skip] + ": cudaErrorUnknown: an error of the shim");
    counts.check(skip < 3 ? 0 : static_cast<int64_t>(skip) - 3, skip >= 3);
    cuda_shim::run_all();
  }
}

}  // namespace

void run_update_tests() {
  RUN(rows_of_all_sizes_at_all_addresses);
  RUN(missing_operands);
  RUN(the_step_may_be_on_the_device);
  RUN(elements_that_need_the_exact_path);
  RUN(tiny_and_distant_elements);
  RUN(number_of_reads_of_an_update);
  RUN(updates_that_are_lost_in_rounding);
  RUN(results_do_not_depend_on_the_schedule_or_the_other_updates);
  RUN(large_updates);
  RUN(every_update_finds_its_chunks_and_rows);
  RUN(memory_that_updates_need);
  RUN(updates_that_the_kernels_cannot_read);
  RUN(errors_of_calls_with_updates);
}

}  // namespace paramstats::test
