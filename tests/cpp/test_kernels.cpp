// The CPU engine at every SIMD level that this processor has: element types, sizes and addresses,
// hostile values, strides, threads, and the thread's treatment of subnormals.
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
#include "check.h"
#include "flushing.h"
#include "hostile.h"
#include "oracle.h"
#include "tensor.h"

namespace paramstats::cpu::test {
namespace {

void levels_are_listed_once_the_plainest_last() {
  const auto& levels = available_kernels();
  for (size_t i = 1; i < levels.size(); ++i) CHECK(levels[i] == levels[i - 1], false);
  CHECK(std::string(levels.back()->name), std::string("plain"));
}

// ---- element types -------------------------------------------------------------------------

void the_decoders_give_the_formats_own_figures() {
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

// One element goes through the padded vector, 64 the same through every lane of the widest level.
void every_pattern_of_8_and_16_bits_is_read_right() {
  for (DType dtype : all_dtypes()) {
    if (element_size(dtype) > 2) continue;
    for (uint64_t bits = 0; bits < uint64_t{1} << (8 * element_size(dtype)); ++bits) {
      const auto one = oracle::truth_of({oracle::decode(dtype, bits)}).exact;
      for (int64_t n : {1, 64}) {
        Moments want = one;  // a constant: no statistic has any rounding
        for (int64_t* count :
             {&want.count, &want.zeros, &want.nans, &want.pos_infs, &want.neg_infs}) {
          *count *= n;
        }
        uint64_t copies[64 * 2 / 8];
        if (element_size(dtype) == 1) std::memset(copies, static_cast<int>(bits), n);
        if (element_size(dtype) == 2) std::fill_n(copies, 16, bits * 0x0001000100010001);
        for (const Kernels* kernels : available_kernels()) {
          oracle::check_same(kernels->chunk[static_cast<int>(dtype)](copies, n), want);
        }
      }
    }
  }
}

void wide_integers_keep_their_extremes() {
  for (DType dtype : {DType::kInt32, DType::kUInt32, DType::kInt64, DType::kUInt64}) {
    Tensor t(dtype, 100);
    const uint64_t top = uint64_t{1} << (8 * element_size(dtype) - 1);
    // Smallest and largest, signed or not; one that a double must round.
    const uint64_t edges[] = {0, ~uint64_t{0}, top, top - 1, (uint64_t{1} << 53) + 1};
    for (uint64_t edge : edges) {
      t.fill([=](int64_t i) { return i % 9 == 0 ? edge : i % 9; });
      check_at_every_level("edge " + std::to_string(edge), t, oracle::kDoubleLanes);
    }
  }
}

// ---- sizes and addresses -------------------------------------------------------------------

void every_size_at_every_address() {
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
      for (int64_t first : {0, 1, 2, 3, 5, 7}) {
        check_at_every_level("n=" + std::to_string(n) + "+" + std::to_string(first),
                             Tensor(dtype, n, first), bounds(dtype));
      }
    }
    for (int64_t n : {kPart - 1, kPart, kPart + 1, kPart + kBlock - 1, kPart + kBlock,
                      kPart + kBlock + 1, kChunk - 1, kChunk, kChunk + 1}) {
      check_at_every_level("n=" + std::to_string(n), Tensor(dtype, n, n % 3), bounds(dtype));
    }
  }
}

// ---- hostile values ------------------------------------------------------------------------

// Not even aligned to an element, as views of other bytes may be; with and without gaps.
void any_odd_address() {
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {1, 3, 17, 200}) {
      for (int64_t stride : {1, 3}) {
        const Tensor t(dtype, Shape{n}, Shape{stride});
        std::vector<unsigned char> shifted(t.memory.size() + 1);
        std::memcpy(shifted.data() + 1, t.memory.data(), t.memory.size());
        TensorView view = t.view();
        view.data = shifted.data() + 1;
        for (const Kernels* kernels : available_kernels()) {
          check::at(std::string(kernels->name) + " " + name_of(dtype));
          Moments state;
          summarize({view}, {&state}, *kernels, nullptr);
          CHECK(oracle::same_bits(state, summary_of(t, *kernels)), true);
        }
      }
    }
  }
}

void constants_have_no_variance() {
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {int64_t{2}, int64_t{3}, int64_t{100}, 2 * kBlock + 5}) {
      for (int repetition = 0; repetition < 20; ++repetition) {
        const uint64_t bits = oracle::random_bits(dtype, rng);
        Tensor t(dtype, n);
        t.fill([=](int64_t) { return bits; });
        for (const Kernels* kernels : available_kernels()) {
          check::at(std::string(kernels->name) + " " + name_of(dtype));
          const Moments state = summary_of(t, *kernels);
          CHECK(state.mean, oracle::decode(dtype, bits));
          CHECK(state.m2, 0);
        }
      }
    }
  }
}

// Narrow lanes count to 255; a chunk of zeros has more in each.
void zeros_of_either_sign_are_all_counted() {
  for (DType dtype : all_dtypes()) {
    const uint64_t negative =
        oracle::is_float(dtype) ? uint64_t{1} << (8 * element_size(dtype) - 1) : 0;
    for (int64_t n : {int64_t{5}, kBlock, kChunk + 3}) {
      for (int every : {1, 3}) {
        Tensor t(dtype, n);
        t.fill([=](int64_t i) { return i % every ? negative : 0; });
        check_at_every_level("zeros of " + std::to_string(n), t, bounds(dtype));
      }
    }
  }
}

// What tells the smallest and the largest apart by their bits depends on the signs that there are.
void extremes_of_one_sign() {
  for (DType dtype : all_dtypes()) {
    if (!oracle::is_float(dtype)) continue;
    const uint64_t sign = uint64_t{1} << (8 * element_size(dtype) - 1);
    for (int64_t n : {1, 3, 64, 100, 1000, 9999}) {
      for (int kind = 0; kind < 4;
           ++kind) {  // positive, negative, with a zero, with one of the other
        Tensor t(dtype, n);
        t.fill([=](int64_t i) {
          uint64_t bits = oracle::random_bits(dtype, rng) & ~sign;
          if (kind % 2) bits |= sign;
          if (kind >= 2 && i == n / 2) bits = kind == 2 ? 0 : bits ^ sign;
          return bits;
        });
        check_at_every_level("sign " + std::to_string(kind), t, bounds(dtype));
      }
    }
  }
}

void one_nan_of_a_narrow_float_anywhere() {
  const struct {
    DType dtype;
    uint64_t nan;
  } kNaNs[] = {{DType::kBFloat16, 0x7fc0},   {DType::kBFloat16, 0xff81},
               {DType::kFloat16, 0x7e01},    {DType::kFloat16, 0xfe00},
               {DType::kFloat8E4M3FN, 0x7f}, {DType::kFloat8E4M3FN, 0xff},
               {DType::kFloat8E5M2, 0x7d},   {DType::kFloat8E5M2, 0xfe}};
  for (const auto& [dtype, nan] : kNaNs) {
    for (int64_t n : {int64_t{1}, int64_t{70}, 2 * kBlock + 19}) {
      for (int64_t at : {int64_t{0}, n / 3, n / 2, n - 1}) {
        Tensor t(dtype, n);
        std::memcpy(t.memory.data() + at * element_size(dtype), &nan, element_size(dtype));
        check_at_every_level("NaN at " + std::to_string(at), t, bounds(dtype));
      }
    }
  }
}

void hostile_values() {
  for (const Hostile& h : kHostiles) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
      check_at_every_level(h.name, hostile(dtype, h.at), oracle::kFloatLanes);
    }
  }
}

void one_that_is_not_finite_anywhere() {
  for (double odd : {kNaN, kInf, -kInf}) {
    for (int64_t position : {int64_t{0}, int64_t{37}, kHostile / 2, kHostile - 14, kHostile - 1}) {
      Tensor t = hostile(DType::kFloat32, [](int64_t) { return 1000 + 0.02 * noise(); });
      const auto bits = static_cast<float>(odd);
      std::memcpy(t.memory.data() + position * 4, &bits, 4);
      check_at_every_level(std::to_string(odd) + " at " + std::to_string(position), t,
                           oracle::kFloatLanes);
    }
  }
}

// ---- strides -------------------------------------------------------------------------------

struct Layout {
  const char* name;
  Shape sizes, strides;
};

void strided_views_count_every_logical_element() {
  const Layout kLayouts[] = {
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
      {"sizes of one", {1, 33, 1}, {999, 1, 7}},
      {"sizes of one and gaps", {1, 33, 1, 4}, {5, 16, 0, 2}},
      {"channels_last slice", {4, 5, 9, 11}, {16 * 99, 1, 16 * 11, 16}},
      {"overlapping windows", {100, 50}, {1, 1}},
      {"4-D with gaps all over", {3, 4, 5, 6}, {1000, 200, 30, 3}},
      {"chunks that end inside rows", {300, 1000}, {1, 304}},
      {"expanded over chunks", {500, 301}, {0, 1}},
  };
  for (const Layout& l : kLayouts) {
    for (DType dtype : {DType::kInt8, DType::kFloat16, DType::kFloat32, DType::kFloat64}) {
      check_at_every_level(l.name, Tensor(dtype, l.sizes, l.strides, 1), bounds(dtype));
    }
  }
}

void dense_permutations_are_read_in_memory_order() {
  const Layout kLayouts[] = {
      {"transposed", {53, 370}, {1, 53}},
      {"channels_last", {4, 16, 9, 11}, {16 * 99, 1, 16 * 11, 16}},
      {"reversed dimensions", {3, 40, 50, 60}, {1, 3, 120, 6000}},
      {"sizes of one", {1, 70, 1, 80}, {3, 1, 0, 70}},
  };
  for (const Layout& l : kLayouts) {
    for (DType dtype : all_dtypes()) {
      const Tensor permuted(dtype, l.sizes, l.strides);
      Tensor flat(dtype, permuted.numel());
      flat.memory = permuted.memory;
      check_at_every_level(l.name, permuted, bounds(dtype));
      for (const Kernels* k : available_kernels()) {
        CHECK(oracle::same_bits(summary_of(permuted, *k), summary_of(flat, *k)), true);
      }
    }
  }
}

// ---- threads -------------------------------------------------------------------------------

std::atomic<int> pool_calls{0};

template <int kThreads>
void shuffling_pool(int64_t n, Task task, void* context) {
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

void any_pool_and_any_company_give_the_same_bits() {
  Tensor large(DType::kFloat32, 5 * kChunk + 77);
  large.fill([](int64_t i) {  // means that differ by chunk: another order of merges would be seen
    const float value = static_cast<float>(std::exp(i / kChunk) + noise());
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  });
  const Tensor exact(DType::kBFloat16, 2 * kChunk);
  const Tensor gaps(DType::kFloat16, {300, 1000}, {1, 304}), bytes(DType::kUInt8, 3 * kChunk - 1);
  const Tensor small(DType::kFloat32, 1000), tiny(DType::kInt64, 3), none(DType::kFloat32, 0);
  const Tensor odd = hostile(DType::kFloat64, [](int64_t i) { return i % 7 ? noise() : kNaN; });
  std::vector<const Tensor*> company = {&none, &large, &tiny, &exact, &gaps, &small, &bytes, &odd};
  for (const Kernels* kernels : available_kernels()) {
    std::vector<Moments> alone;
    for (const Tensor* t : company) alone.push_back(summary_of(*t, *kernels));

    const auto check_company = [&](const char* what, const std::vector<size_t>& who, Pool pool) {
      check::at(std::string(kernels->name) + " " + what);
      std::vector<const Tensor*> tensors;
      for (size_t w : who) tensors.push_back(company[w]);
      const std::vector<Moments> states = summaries_of(tensors, *kernels, pool);
      for (size_t i = 0; i < who.size(); ++i) {
        CHECK(oracle::same_bits(states[i], alone[who[i]]), true);
      }
    };
    std::vector<size_t> who(company.size());
    std::iota(who.begin(), who.end(), size_t{0});
    for (int repetition = 0; repetition < 10; ++repetition) {
      check_company("no pool", who, nullptr);
      const int before = pool_calls;
      check_company("1 thread", who, shuffling_pool<1>);
      check_company("2 threads", who, shuffling_pool<2>);
      check_company("7 threads", who, shuffling_pool<7>);
      check_company("large alone, 2 threads", {1}, shuffling_pool<2>);
      check_company("large twice, 7 threads", {1, 6, 1}, shuffling_pool<7>);
      CHECK(pool_calls - before, 5);
      std::shuffle(who.begin(), who.end(), rng);
    }
  }
}

// ---- subnormals ----------------------------------------------------------------------------

void flushing_to_zero_changes_nothing() {
  std::vector<Tensor> tensors;
  for (DType dtype : all_dtypes()) {
    if (!oracle::is_float(dtype)) continue;
    const oracle::FloatFormat f = oracle::float_format(dtype);
    Tensor t(dtype, kChunk + kBlock + 5);  // two chunks: their merge must not flush either
    t.fill([=](int64_t i) {
      const uint64_t mantissa = 1 + rng() % ((uint64_t{1} << f.mantissa_bits) - 1);
      const uint64_t sign = i >= kChunk;  // each chunk has one end of the range
      return i % 11 == 0 ? 0 : sign << (f.exponent_bits + f.mantissa_bits) | mantissa;
    });
    tensors.push_back(t);
  }
  std::vector<const Tensor*> pointers;
  for (const Tensor& t : tensors) pointers.push_back(&t);
  for (const Kernels* kernels : available_kernels()) {
    const std::vector<Moments> want = summaries_of(pointers, *kernels);
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
      std::vector<Moments> got;
      bool still_on = false;
      {
        const flushing::FlushingToZero flush;
        got = summaries_of(pointers, *kernels, pool);
        still_on = flushing::is_on();
      }
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

int run_all() {
  RUN(levels_are_listed_once_the_plainest_last);
  RUN(the_decoders_give_the_formats_own_figures);
  RUN(every_pattern_of_8_and_16_bits_is_read_right);
  RUN(wide_integers_keep_their_extremes);
  RUN(every_size_at_every_address);
  RUN(any_odd_address);
  RUN(constants_have_no_variance);
  RUN(zeros_of_either_sign_are_all_counted);
  RUN(extremes_of_one_sign);
  RUN(one_nan_of_a_narrow_float_anywhere);
  RUN(hostile_values);
  RUN(one_that_is_not_finite_anywhere);
  RUN(strided_views_count_every_logical_element);
  RUN(dense_permutations_are_read_in_memory_order);
  RUN(any_pool_and_any_company_give_the_same_bits);
  RUN(flushing_to_zero_changes_nothing);
  std::string levels;
  for (const Kernels* kernels : available_kernels()) levels += std::string(" ") + kernels->name;
  return check::report("cpp kernels:" + levels);
}

}  // namespace
}  // namespace paramstats::cpu::test

int main() { return paramstats::cpu::test::run_all(); }
