// Tests of the CPU backend at every SIMD level that this CPU supports: the cases of all backends
// (cases.h), strides, unaligned addresses, thread pools, and flush-to-zero.
//
//     g++ -std=c++17 -O2 -pthread tests/cpp/test_kernels.cpp csrc/cpu/*.cpp -o build/test_kernels
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "cases.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paramstats::test {

using cpu::available_kernels;
using cpu::kChunk;
using cpu::Kernels;
using cpu::kPart;
using cpu::Pool;

std::vector<Result> summarize(const Tensors& tensors) {
  std::vector<Result> results;
  for (const Kernels* kernels : available_kernels()) {
    results.push_back({kernels->name, cpu_states(tensors, *kernels)});
  }
  return results;
}

std::vector<int64_t> boundary_sizes(DType) {
  return {kPart - 1,          kPart,      kPart + 1, kPart + kBlock - 1, kPart + kBlock,
          kPart + kBlock + 1, kChunk - 1, kChunk,    kChunk + 1};
}

namespace {

void levels_are_distinct_and_end_with_plain() {
  const auto& levels = available_kernels();
  for (size_t i = 1; i < levels.size(); ++i) CHECK(levels[i] == levels[i - 1], false);
  CHECK(std::string(levels.back()->name), std::string("plain"));
}

void the_oracle_decodes_known_patterns() {
  using oracle::decode;
  CHECK(decode(DType::kBFloat16, 0x3f80), 1);
  CHECK(decode(DType::kBFloat16, 0x0001), 0x1p-133);
  CHECK(decode(DType::kFloat16, 0xc000), -2);
  CHECK(decode(DType::kFloat16, 0x7bff), 65504);
  CHECK(decode(DType::kFloat16, 0x0001), 0x1p-24);
  CHECK(decode(DType::kFloat8E4M3FN, 0x7e), 448);
  CHECK(decode(DType::kFloat8E4M3FN, 0x7f), kNaN);
  CHECK(decode(DType::kFloat8E4M3FN, 0x01), 0x1p-9);
  CHECK(decode(DType::kFloat8E5M2, 0x7b), 57344);
  CHECK(decode(DType::kFloat8E5M2, 0xfc), -kInf);
  CHECK(decode(DType::kFloat8E5M2, 0x01), 0x1p-16);
  CHECK(decode(DType::kFloat32, 0xff7fffff), -FLT_MAX);
  CHECK(decode(DType::kFloat64, 1), DBL_TRUE_MIN);
  CHECK(decode(DType::kInt8, 0x80), -128);
  CHECK(decode(DType::kUInt64, ~uint64_t{0}), 0x1p64);
}

// Sums of bytes have no rounding, also where every narrow lane has its largest sum.
void sums_of_bytes_are_exact() {
  for (DType dtype : {DType::kInt8, DType::kUInt8, DType::kBool}) {
    const int lowest = dtype == DType::kInt8 ? -128 : 0;
    const int highest = dtype == DType::kInt8 ? 127 : dtype == DType::kUInt8 ? 255 : 1;
    for (int64_t n : {int64_t{1}, int64_t{63}, kChunk - 1, kChunk}) {
      for (int64_t ones : {int64_t{0}, n / 2, n}) {  // elements that are `highest`
        Tensor t(dtype, n);
        t.fill([=](int64_t i) { return i < ones ? highest : lowest; });
        const double k = static_cast<double>(ones), range = highest - lowest;
        for (const Kernels* kernels : available_kernels()) {
          check::at(std::string(kernels->name) + " " + name_of(dtype) + " " + std::to_string(n));
          const Moments state = kernels->chunk[static_cast<int>(dtype)](t.data(), n);
          CHECK(state.count, n);
          CHECK(state.mean, (n * lowest + k * range) / n);
          CHECK(state.m2, range * range * k * (n - k) / n);
          CHECK(state.zeros, (lowest == 0 ? n - ones : 0));
          CHECK(state.min, (ones == n ? highest : lowest));
          CHECK(state.max, (ones == 0 ? lowest : highest));
        }
      }
    }
  }
}

// ---- strides and addresses -----------------------------------------------------------------

void strided_views() {
  const struct {
    const char* name;
    Shape sizes, strides;
  } kLayouts[] = {
      {"scalar", {}, {}},
      {"empty", {3, 0, 5}, {5, 5, 1}},
      {"rows with gaps", {40, 30}, {64, 1}},
      {"columns with gaps", {40, 30}, {64, 2}},
      {"every third", {1000}, {3}},
      {"transposed slice", {30, 40}, {1, 64}},
      {"expanded rows", {5, 70}, {0, 1}},
      {"expanded columns", {70, 5}, {1, 0}},
      {"expanded in the middle", {6, 7, 8}, {8, 0, 1}},
      {"expanded scalar", {9, 7}, {0, 0}},
      {"sizes of one with gaps", {1, 33, 1}, {999, 1, 7}},
      {"sizes of one and two gaps", {1, 33, 1, 4}, {5, 16, 0, 2}},
      {"channels_last slice", {4, 5, 9, 11}, {16 * 99, 1, 16 * 11, 16}},
      {"overlapping windows", {100, 50}, {1, 1}},
      {"4-D with gaps everywhere", {3, 4, 5, 6}, {1000, 200, 30, 3}},
      {"chunks that end inside rows", {300, 1000}, {1, 304}},
      {"expanded over chunks", {500, 301}, {0, 1}},
      {"transposed", {53, 370}, {1, 53}},
      {"channels_last", {4, 16, 9, 11}, {16 * 99, 1, 16 * 11, 16}},
      {"reversed dimensions", {3, 40, 50, 60}, {1, 3, 120, 6000}},
      {"sizes of one", {1, 70, 1, 80}, {3, 1, 0, 70}},
  };
  for (const auto& [name, sizes, strides] : kLayouts) {
    for (DType dtype : all_dtypes()) {
      const Tensor view(dtype, sizes, strides, 1);
      check_all(name, {view});
      Tensor flat(dtype, view.numel(), 1);
      if (flat.memory.size() != view.memory.size()) continue;
      flat.memory = view.memory;  // a dense view is read in memory order
      for (const Result& result : summarize({view, flat})) {
        CHECK(oracle::same_bits(result.states[0], result.states[1]), true);
      }
    }
  }
}

// Views of bytes may start at an address that is not aligned to an element.
void unaligned_addresses() {
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {1, 3, 17, 200}) {
      for (int64_t stride : {1, 3}) {
        const Tensor t(dtype, Shape{n}, Shape{stride});
        std::vector<unsigned char> shifted(t.memory.size() + 1);
        std::memcpy(shifted.data() + 1, t.memory.data(), t.memory.size());
        cpu::TensorView view = t.view();
        view.data = shifted.data() + 1;
        for (const Kernels* kernels : available_kernels()) {
          check::at(std::string(kernels->name) + " " + name_of(dtype));
          Moments state;
          cpu::summarize({view}, {&state}, *kernels, nullptr);
          CHECK(oracle::same_bits(state, cpu_states({t}, *kernels)[0]), true);
        }
      }
    }
  }
}

// ---- thread pools --------------------------------------------------------------------------

std::atomic<int> pool_calls{0};

template <int kThreads>
void shuffling_pool(int64_t n, cpu::Task task, void* context) {
  static oracle::Rng shuffler(kThreads);
  ++pool_calls;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), shuffler);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int64_t i; (i = next++) < n;) task(order[i], context);
    });
  }
  for (auto& thread : threads) thread.join();
}

void results_do_not_depend_on_the_pool_or_the_other_tensors() {
  Tensor large(DType::kFloat32, 5 * kChunk + 77);
  large.fill([](int64_t i) {  // means differ by chunk, so that a different merge order shows
    const float value = static_cast<float>(std::exp(i / kChunk) + noise());
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  });
  const auto nan_or_noise = [](int64_t i) { return i % 7 ? noise() : kNaN; };
  const Tensors tensors = {Tensor(DType::kFloat32, 0),
                           large,
                           Tensor(DType::kInt64, 3),
                           Tensor(DType::kBFloat16, 2 * kChunk),
                           Tensor(DType::kFloat16, {300, 1000}, {1, 304}),
                           Tensor(DType::kFloat32, 1000),
                           Tensor(DType::kUInt8, 3 * kChunk - 1),
                           tensor_of(DType::kFloat64, kCaseSize, nan_or_noise)};
  const struct {
    const char* name;
    Pool run;
  } kPools[] = {{"no pool", nullptr},
                {"1 thread", shuffling_pool<1>},
                {"2 threads", shuffling_pool<2>},
                {"7 threads", shuffling_pool<7>}};
  for (const Kernels* kernels : available_kernels()) {
    std::vector<Moments> alone;
    for (const Tensor& t : tensors) alone.push_back(cpu_states({t}, *kernels)[0]);

    std::vector<size_t> all(tensors.size());
    std::iota(all.begin(), all.end(), size_t{0});
    for (int repetition = 0; repetition < 10; ++repetition) {
      for (const std::vector<size_t>& selection : {all, {1}, {1, 6, 1}}) {
        Tensors selected;
        for (size_t i : selection) selected.push_back(tensors[i]);
        for (const auto& pool : kPools) {
          check::at(std::string(kernels->name) + " " + pool.name);
          const int before = pool_calls;
          const auto states = cpu_states(selected, *kernels, pool.run);
          CHECK(pool_calls - before, pool.run == nullptr ? 0 : 1);
          for (size_t i = 0; i < selection.size(); ++i) {
            CHECK(oracle::same_bits(states[i], alone[selection[i]]), true);
          }
        }
      }
      std::shuffle(all.begin(), all.end(), rng);
    }
  }
}

// ---- subnormals ----------------------------------------------------------------------------

// Makes the CPU treat subnormal numbers as zero, as torch.set_flush_denormal does. Returns whether
// it did before. Applies to this thread and the threads that it starts.
bool set_flush_to_zero([[maybe_unused]] bool on) {
#if defined(__x86_64__)
  constexpr unsigned kFlush = 0x8040;  // FTZ and DAZ
  const unsigned before = _mm_getcsr();
  _mm_setcsr(on ? before | kFlush : before & ~kFlush);
  return (before & kFlush) == kFlush;
#elif defined(__aarch64__)
  constexpr uint64_t kFlush = uint64_t{1} << 24;  // FZ
  uint64_t before;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before));
  __asm__ volatile("msr fpcr, %0" : : "r"(on ? before | kFlush : before & ~kFlush));
  return (before & kFlush) == kFlush;
#else
  return true;
#endif
}

void flush_to_zero_changes_nothing() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    if (!oracle::is_float(dtype)) continue;
    const oracle::FloatFormat f = oracle::float_format(dtype);
    tensors.emplace_back(dtype, kChunk + kBlock + 5);  // two chunks: merging must not flush either
    tensors.back().fill([=](int64_t i) {
      const uint64_t mantissa = 1 + rng() % ((uint64_t{1} << f.mantissa_bits) - 1);
      const uint64_t sign = i >= kChunk ? oracle::sign_bit(dtype) : 0;
      return i % 11 == 0 ? 0 : sign | mantissa;
    });
  }
  for (const Kernels* kernels : available_kernels()) {
    const std::vector<Moments> want = cpu_states(tensors, *kernels);
    for (size_t i = 0; i < want.size(); ++i) {
      check::at(std::string(kernels->name) + " " + name_of(tensors[i].dtype));
      const auto truth = oracle::truth_of(tensors[i].values());
      oracle::check_counts(want[i], truth.exact);
      // The squares of float64's subnormals are too small for any double.
      if (tensors[i].dtype != DType::kFloat64) {
        oracle::check_state(want[i], truth, oracle::kFloatLanes);
      }
    }
    for (Pool pool : {Pool{nullptr}, Pool{shuffling_pool<2>}}) {
      set_flush_to_zero(true);
      const std::vector<Moments> got = cpu_states(tensors, *kernels, pool);
      const bool still_on = set_flush_to_zero(false);
      const std::string where = std::string(kernels->name) + (pool ? " 2 threads " : " no pool ");
      check::at(where);
      CHECK(still_on, true);
      for (size_t i = 0; i < want.size(); ++i) {
        check::at(where + name_of(tensors[i].dtype));
        oracle::check_same(got[i], want[i]);
      }
    }
  }
}

}  // namespace
}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  RUN(levels_are_distinct_and_end_with_plain);
  RUN(the_oracle_decodes_known_patterns);
  run_cases<1>();
  RUN(rare_elements_after_many_without_zeros);
  RUN(sums_of_bytes_are_exact);
  RUN(strided_views);
  RUN(unaligned_addresses);
  RUN(results_do_not_depend_on_the_pool_or_the_other_tensors);
  RUN(flush_to_zero_changes_nothing);
  std::string levels;
  for (const auto* kernels : available_kernels()) levels += std::string(" ") + kernels->name;
  return check::report("cpp kernels:" + levels);
}
