// Tests of the updates of the CPU backend at every SIMD level that this CPU supports.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "update_operands.h"

namespace paramstats::test {
namespace {

using cpu::available_kernels;
using cpu::kChunk;
using cpu::Kernels;
using cpu::kUpdateBlock;

// ---- values --------------------------------------------------------------------------------

void all_mixes_of_dtypes() {
  for (DType w : kDTypesOfUpdates) {
    for (DType g : kDTypesOfUpdates) {
      for (DType m : kDTypesOfUpdates) {
        for (DType v : kDTypesOfUpdates) {
          Operands o = typical(w, g, m, v, 333);
          check_update("mix", o);
          o.method = UpdateMethod::kDifference;
          check_update("mix, difference", o);
        }
      }
    }
  }
}

void all_sizes() {
  for (DType dtype : kDTypesOfUpdates) {
    for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{7}, int64_t{8}, int64_t{15},
                      int64_t{17}, int64_t{100}, kUpdateBlock - 1, kUpdateBlock, kUpdateBlock + 1,
                      kChunk - 1, kChunk + 1, 2 * kChunk + kUpdateBlock + 3}) {
      if (n >= kChunk - 1 && dtype != DType::kFloat32) continue;
      for (int64_t first : {0, 1}) {
        if (n > kChunk && first == 1) continue;
        Operands o = typical(dtype, dtype, dtype, dtype, n, first);
        check_update("size", o);
        o.method = UpdateMethod::kDifference;
        check_update("size, difference", o);
      }
    }
  }
}

void missing_operands() {
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (int present = 0; present < 8; ++present) {
      for (UpdateMethod method :
           {UpdateMethod::kNone, UpdateMethod::kFormula, UpdateMethod::kDifference}) {
        Operands o = typical(dtype, dtype, dtype, dtype, 1003);
        o.has_grad = present & 1;
        o.has_momentum = present & 2;
        o.has_variance = present & 4;
        o.method = method;
        if (method == UpdateMethod::kFormula && !(o.has_momentum && o.has_variance)) continue;
        check_update("present " + std::to_string(present), o);
      }
    }
  }
}

// Values that float32 cannot represent in between, and values that are not finite.
void difficult_values() {
  const struct {
    const char* name;
    double w, g, m, v;
  } kCases[] = {
      {"large update", 1, 1e-3, 1e38, 0},
      {"large root", 1, 1e-3, 1e30, 1e38},
      {"products underflow", 1, 1e-30, 1e-30, 1e-38},
      {"subnormals", 1e-40, 1e-40, 1e-41, 1e-45},
      {"lag overflows", 1, 1e38, 1, 0},
      {"lag underflows", 1, 1e-30, 1, 1e20},
      {"update underflows", 0, 1e-3, 1e-37, 1},
      {"NaN weight", kNaN, 1, 1, 1},
      {"NaN gradient", 1, kNaN, 1, 1},
      {"NaN momentum", 1, 1, kNaN, 1},
      {"NaN variance", 1, 1, 1, kNaN},
      {"infinite weight", kInf, 1, 1, 1},
      {"infinite gradient", 1, -kInf, 1, 1},
      {"infinite momentum", 1, 1, -kInf, 1},
      {"infinite variance", 1, 1, 1, kInf},
      {"infinite gradient, zero momentum", 1, kInf, 0, 0},
      {"zeros", 0, 0, 0, 0},
  };
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const auto& c : kCases) {
      for (int64_t every : {int64_t{1}, kUpdateBlock}) {
        Operands o = typical(dtype, dtype, dtype, dtype, kUpdateBlock + 100);
        for (int64_t i = 0; i < o.param.numel(); i += every) {
          o.param.set(i, encode(dtype, c.w));
          o.grad.set(i, encode(dtype, c.g));
          o.momentum.set(i, encode(dtype, c.m));
          o.variance.set(i, encode(dtype, c.v));
        }
        check_update(c.name, o);
        o.method = UpdateMethod::kDifference;
        check_update(std::string(c.name) + ", difference", o);
      }
    }
  }
}

void variances_at_the_threshold() {
  for (DType dtype : kDTypesOfUpdates) {
    Operands o = typical(dtype, dtype, dtype, dtype, 999);
    o.step = {1e-3, 0, 0.5, 0.5, 0x1p-4, 1};  // v < 2^-9 exactly
    const uint64_t threshold = encode(dtype, 0x1p-9);
    o.variance.fill([&](int64_t i) { return threshold + i % 3 - 1; });
    check_update("threshold", o);
    for (const Kernels* kernels : available_kernels()) {
      const States got = states_of(o, *kernels);
      CHECK(got.rows[kLag].zeros, 333);
    }
  }
}

// At step 0, whose bias corrections are 0, no element of dw is finite.
void constants_that_are_not_finite() {
  for (int64_t n : {1, 8, 13, 4099}) {
    Operands o = typical(DType::kFloat32, DType::kFloat32, DType::kFloat32, DType::kFloat32, n);
    o.step.step = 0;
    for (const Kernels* kernels : available_kernels()) {
      check::at(std::string(kernels->name) + " n=" + std::to_string(n));
      const States got = states_of(o, *kernels);
      CHECK(got.rows[kUpdate].count, n);
      CHECK(finite_count(got.rows[kUpdate]), 0);
      CHECK(got.rows[kUpdate].zeros, 0);
      CHECK(got.rows[kUpdateGrad].nans, n);
      CHECK(got.rows[kGradMomentum].nans, 0);
    }
  }
}

// ---- lost updates --------------------------------------------------------------------------

template <DType kDType, class T>
void check_lost(uint64_t bits) {
  const double w = oracle::decode(kDType, bits);
  if (!std::isfinite(w)) return;
  for (bool above : {false, true}) {
    const T half = static_cast<T>(oracle::half_step(kDType, bits, above));
    for (T size : {T{0}, half / 4, half / 2, half, half * 2, half * 3}) {
      for (T near : {size, std::nextafter(size, T{0}), std::nextafter(size, T{1})}) {
        const T dw = above ? -near : near;
        const bool want = oracle::is_lost(kDType, bits, dw);
        const bool got = is_lost<kDType>(static_cast<T>(w), dw);
        if (got == want) continue;
        check::at(name_of(kDType) + " w=" + std::to_string(w) + " dw=" + std::to_string(dw));
        CHECK(got, want);
      }
    }
  }
}

void lost_updates_are_found_exactly() {
  for (uint64_t bits = 0; bits < 1 << 16; ++bits) {
    check_lost<DType::kBFloat16, float>(bits);
    check_lost<DType::kBFloat16, double>(bits);
    check_lost<DType::kFloat16, float>(bits);
    check_lost<DType::kFloat16, double>(bits);
    if (bits % 8 != 0) continue;
    const uint64_t upper = bits << 16 | (rng() & 7) << 16;
    for (uint64_t lower : {uint64_t{0}, rng() & 0xffff}) {
      check_lost<DType::kFloat32, float>(upper | lower);
      check_lost<DType::kFloat32, double>(upper | lower);
    }
  }
}

// lr * m / sqrt(v) = lr with beta1 = beta2 = 0 and without eps: dw = -lr.
void known_updates_are_lost() {
  const struct {
    DType dtype;
    double w, lr;
    bool lost;
  } kCases[] = {
      {DType::kBFloat16, 1, 0x1p-8, true},     // a tie: 1 is even
      {DType::kBFloat16, 1, 0x1.1p-8, false},  //
      {DType::kBFloat16, 1 + 0x1p-7, 0x1p-8, false},
      {DType::kBFloat16, 1 + 0x1p-7, 0x1.fffp-9, true},
      {DType::kBFloat16, -1, 0x1p-9, true},  // steps towards zero are half as large
      {DType::kBFloat16, -1, 0x1.1p-9, false},
      {DType::kFloat16, 1, 0x1p-11, true},
      {DType::kFloat16, 1, 0x1.1p-11, false},
      {DType::kFloat16, 0x1p-20, 0x1p-25, true},
      {DType::kFloat16, 0x1p-24, 0x1p-25, false},
      {DType::kFloat32, 1, 0x1p-24, true},
      {DType::kFloat32, 1, 0x1.1p-24, false},
      {DType::kFloat32, 1, 0x1.8001p-140, true},  // float32 has no such learning rate
      {DType::kFloat64, 1, 0x1p-53, true},
      {DType::kFloat64, 1, 0x1.1p-53, false},
  };
  for (const auto& c : kCases) {
    const auto of = [](DType dtype, double value) {
      return tensor_of_values(dtype, 37, [=](int64_t) { return value; });
    };
    Operands o = {of(c.dtype, c.w), of(DType::kFloat32, 1), of(DType::kFloat32, 1),
                  of(DType::kFloat32, 1), of(c.dtype, 0)};
    o.step = {c.lr, 0, 0, 0, 0, 1};
    for (const Kernels* kernels : available_kernels()) {
      check::at(std::string(kernels->name) + " " + name_of(c.dtype) + " " + std::to_string(c.lr));
      const Moments row = states_of(o, *kernels).rows[kUpdate];
      CHECK(row.zeros, c.lost ? 37 : 0);
      CHECK(row.mean, -c.lr);
      CHECK(row.m2, 0);
    }
  }
}

// ---- memory and threads --------------------------------------------------------------------

void unaligned_addresses() {
  for (DType dtype : kDTypesOfUpdates) {
    for (int64_t n : {int64_t{5}, kUpdateBlock + 5}) {
      const Operands o = typical(dtype, dtype, dtype, dtype, n);
      const Tensor* tensors[] = {&o.param, &o.grad, &o.momentum, &o.variance};
      std::vector<std::vector<unsigned char>> shifted;
      for (const Tensor* t : tensors) {
        shifted.emplace_back(t->memory.size() + 1);
        std::memcpy(shifted.back().data() + 1, t->memory.data(), t->memory.size());
      }
      for (const Kernels* kernels : available_kernels()) {
        check::at(std::string(kernels->name) + " " + name_of(dtype));
        std::vector<Moments> rows(kUpdateRows);
        cpu::Update update = o.update(rows.data());
        update.tensors.fill(cpu::kNoTensor);
        cpu::UpdateOperands& in = update.operands;
        cpu::Operand* const operands[] = {&in.param, &in.grad, &in.momentum, &in.variance};
        for (int k = 0; k < 4; ++k) operands[k]->data = shifted[k].data() + 1;
        cpu::summarize({}, {}, *kernels, nullptr, {update});
        const States want = states_of(o, *kernels);
        for (int row = 0; row < kUpdateRows; ++row) {
          CHECK(oracle::same_bits(rows[row], want.rows[row]), true);
        }
      }
    }
  }
}

template <int kThreads>
void threads(int64_t n, cpu::Task task, void* context) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> all;
  for (int t = 0; t < kThreads; ++t) {
    all.emplace_back([&] {
      for (int64_t i; (i = next++) < n;) task(n - 1 - i, context);
    });
  }
  for (auto& thread : all) thread.join();
}

// Many updates in one call, with tensors that are no operands and an operand of two updates.
void results_do_not_depend_on_the_pool() {
  std::vector<Operands> all;
  for (int64_t n : {int64_t{0}, int64_t{10}, 3 * kChunk + 5, int64_t{1000}, kChunk, int64_t{50}}) {
    all.push_back(typical(DType::kFloat32, DType::kBFloat16, DType::kFloat32, DType::kFloat32, n));
    if (n == 1000) all.back().method = UpdateMethod::kDifference;
  }
  const Tensor other(DType::kInt64, 2 * kChunk + 7);
  for (const Kernels* kernels : available_kernels()) {
    std::vector<Moments> want;
    for (const Operands& o : all) {
      const States s = states_of(o, *kernels);
      want.insert(want.end(), s.tensors.begin(), s.tensors.end());
      want.insert(want.end(), s.rows.begin(), s.rows.end());
    }
    want.push_back(cpu_states({other}, *kernels)[0]);
    const States again = states_of(all[2], *kernels);
    want.insert(want.end(), again.rows.begin(), again.rows.end());
    for (cpu::Pool pool : {cpu::Pool{nullptr}, cpu::Pool{threads<1>}, cpu::Pool{threads<2>},
                           cpu::Pool{threads<7>}}) {
      check::at(kernels->name);
      std::vector<Moments> got(want.size());
      std::vector<cpu::TensorView> views;
      std::vector<Moments*> out;
      std::vector<cpu::Update> updates;
      for (size_t i = 0; i < all.size(); ++i) {
        updates.push_back(all[i].update(&got[8 * i + 4]));
        for (size_t& t : updates.back().tensors) t += views.size();
        for (const Tensor* t : {&all[i].param, &all[i].grad, &all[i].momentum, &all[i].variance}) {
          out.push_back(&got[8 * i + views.size() % 4]);
          views.push_back(t->view());
        }
      }
      updates.push_back(updates[2]);
      updates.back().rows = &got[8 * all.size() + 1];
      out.push_back(&got[8 * all.size()]);
      views.push_back(other.view());
      cpu::summarize(views, out, *kernels, pool, updates);
      for (size_t i = 0; i < want.size(); ++i) {
        CHECK(oracle::same_bits(got[i], want[i]), true);
      }
    }
  }
}

}  // namespace
}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  RUN(all_mixes_of_dtypes);
  RUN(all_sizes);
  RUN(missing_operands);
  RUN(difficult_values);
  RUN(variances_at_the_threshold);
  RUN(constants_that_are_not_finite);
  RUN(lost_updates_are_found_exactly);
  RUN(known_updates_are_lost);
  RUN(unaligned_addresses);
  RUN(results_do_not_depend_on_the_pool);
  return check::report("cpp updates");
}
