// Tests of how one block reads one chunk (csrc/cuda/chunk.h) with every kind of arithmetic: also
// with those of architectures that other tests do not choose. A part of test_cuda_kernels.
#include <cuda_runtime.h>

#include <string>

#include "../../csrc/cuda/chunk.h"
#include "tensor.h"

namespace paramstats::test {
namespace {

using namespace paramstats::cuda;

// Calls f(E(), dtype, name) for each way to read a dtype.
template <class F>
void for_each_way(F f) {
  f(Float64(), DType::kFloat64, "float64");
  f(Float32(), DType::kFloat32, "float32");
  f(BFloat16(), DType::kBFloat16, "bfloat16");
  f(Float16Pairs(), DType::kFloat16, "float16 pairs");
  f(Float16FromBits(), DType::kFloat16, "float16 from bits");
  f(Float8E4M3FNPairs(), DType::kFloat8E4M3FN, "e4m3fn pairs");
  f(Float8E4M3FNFromBits(), DType::kFloat8E4M3FN, "e4m3fn from bits");
  f(Float8E5M2Pairs(), DType::kFloat8E5M2, "e5m2 pairs");
  f(Float8E5M2FromBits(), DType::kFloat8E5M2, "e5m2 from bits");
  f(Bytes<int32_t, 1>(), DType::kInt8, "int8 one by one");
  f(Bytes<int32_t, 2>(), DType::kInt8, "int8 two by two");
  f(Bytes<uint32_t, 1>(), DType::kUInt8, "uint8 one by one");
  f(Bytes<uint32_t, 2>(), DType::kUInt8, "uint8 two by two");
  f(Bool(), DType::kBool, "bool");
  f(Int16(), DType::kInt16, "int16");
  f(UInt16(), DType::kUInt16, "uint16");
  f(Int32(), DType::kInt32, "int32");
  f(UInt32(), DType::kUInt32, "uint32");
  f(Int64(), DType::kInt64, "int64");
  f(UInt64(), DType::kUInt64, "uint64");
}

// Reads a tensor as one chunk. The summary is only valid if the chunk was accepted.
struct Read {
  Summary summary;
  bool accepted;
};
template <class E>
Read read(const Tensor& t) {
  Shared<kThreads> shared;
  Read first = {};
  const auto kernel = [&] {
    Summary summary;
    const bool accepted = try_chunk<E>(t.data(), static_cast<int>(t.numel()), shared, summary);
    if (threadIdx.x == 0) first = {accepted ? summary : Summary(), accepted};
  };
  CHECK(cuda_shim::launch(dim3(1), dim3(kThreads), 0, nullptr, kernel), cudaSuccess);
  cuda_shim::run_all();
  return first;
}

// The bits of 1 and the step to 1.25, or of two integers that follow each other.
struct Pattern {
  uint64_t one, quarter;
  explicit Pattern(DType dtype) : one(40), quarter(1) {
    if (!oracle::is_float(dtype)) return;
    const oracle::FloatFormat f = oracle::float_format(dtype);
    one = static_cast<uint64_t>(f.bias()) << f.mantissa_bits;
    quarter = uint64_t{1} << (f.mantissa_bits - 2);
  }
};

// Compares with the oracle; integers of one byte exactly.
template <class E>
void check_read(const Tensor& t, const std::string& what) {
  check::at(what + " n=" + std::to_string(t.numel()) + "+" + std::to_string(t.first));
  const oracle::Truth truth = oracle::truth_of(t.values());
  const Read got = read<E>(t);
  CHECK(got.accepted, paramstats::finite_count(truth.exact) == truth.exact.count);
  if (!got.accepted) return;
  const Summary& s = got.summary;
  const Moments state = {t.numel(), s.zeros, 0, 0, 0, s.mean, s.m2, s.min, s.max};
  oracle::check_state(state, truth, bounds(t.dtype));
  if (!E::kExact) return;
  int64_t n = t.numel(), sum = 0, sum_sq = 0;
  for (double x : t.values()) {
    sum += static_cast<int64_t>(x);
    sum_sq += static_cast<int64_t>(x * x);
  }
  CHECK(s.mean, static_cast<double>(sum) / static_cast<double>(n));
  CHECK(s.m2, static_cast<double>(n * sum_sq - sum * sum) / static_cast<double>(n));
}

// The unrolled loop, the rest of it and the elements at both ends.
void sizes_around_each_loop() {
  for_each_way([](auto e, DType dtype, const char* name) {
    using E = decltype(e);
    const int64_t step = kPerVector<E> * kThreads;  // elements that a block loads at once
    for (int64_t loads : {1, 2, E::kTile, E::kLoads, E::kLoads + 1, 2 * E::kLoads}) {
      for (int64_t more : {int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{kPerVector<E>}}) {
        for (int64_t first : {0, 1}) check_read<E>(Tensor(dtype, loads * step + more, first), name);
      }
    }
    for (int64_t first = 0; first < kPerVector<E>; ++first) {
      for (int64_t n : {1, 2, 15, 16, 17, 31, 40}) check_read<E>(Tensor(dtype, n, first), name);
    }
  });
}

// Ways to read a dtype with the same number of loads add up the same numbers in the same order.
template <class A, class B>
void check_ways(DType dtype) {
  for (int64_t n : {1, 100, 5000, 1 << 15}) {
    const Tensor t(dtype, n, 3);
    check::at("two ways to read " + name_of(dtype) + " n=" + std::to_string(n));
    const Summary a = read<A>(t).summary, b = read<B>(t).summary;
    CHECK(a.zeros, b.zeros);
    CHECK(a.mean, b.mean);
    CHECK(a.m2, b.m2);
    CHECK(a.min, b.min);
    CHECK(a.max, b.max);
  }
}
void ways_with_the_same_loads_have_the_same_bits() {
  check_ways<Float16Pairs, Float16FromBits>(DType::kFloat16);
  check_ways<Bytes<int32_t, 1>, Bytes<int32_t, 2>>(DType::kInt8);
  check_ways<Bytes<uint32_t, 1>, Bytes<uint32_t, 2>>(DType::kUInt8);
}

// Every pattern at the start, at the end, in a vector and alone. (One of them is a NaN among
// numbers, which must not be lost.)
void every_pattern_of_a_byte() {
  for_each_way([](auto e, DType dtype, const char* name) {
    using E = decltype(e);
    if (element_size(dtype) != 1) return;
    for (uint64_t bits = 0; bits < 256; ++bits) {
      const std::string what = name + (" pattern " + std::to_string(bits));
      Tensor one(dtype, 1);
      one.set(0, bits);
      check_read<E>(one, what);
      Tensor many(dtype, 53, 1);
      for (int64_t at : {0, 20 + static_cast<int>(bits % 16), 52}) many.set(1 + at, bits);
      check_read<E>(many, what);
      Tensor alone(dtype, 2100);  // in the unrolled loop of no thread, and then of the first ones
      alone.fill([](int64_t) { return 1; });
      alone.set(static_cast<int64_t>(bits) * 8 + static_cast<int64_t>(bits) % 7, bits);
      check_read<E>(alone, what);
    }
  });
}

// One element at each position of a word that is larger or smaller than all others.
void one_extreme_at_each_position() {
  for_each_way([](auto e, DType dtype, const char* name) {
    using E = decltype(e);
    const uint64_t sign = oracle::sign_bit(dtype);
    const Pattern p(dtype);
    const uint64_t largest = p.one + 3 * p.quarter;
    for (uint64_t extreme : {sign | largest, largest, uint64_t{0}}) {
      for (int64_t at = 0; at < 2 * kPerVector<E>; ++at) {
        Tensor t(dtype, 4 * kPerVector<E>);
        t.fill([=](int64_t i) { return p.one + i % 2 * 2 * p.quarter; });
        t.set(at + kPerVector<E>, extreme);
        check_read<E>(t, name + (" extreme at " + std::to_string(at)));
      }
    }
  });
}

// The largest sums of a whole chunk: they must not overflow, and cancel exactly.
void largest_sums() {
  for_each_way([](auto e, DType dtype, const char* name) {
    using E = decltype(e);
    if (!E::kExact) return;
    for (int64_t n : {kMostElements, kMostElements - 17}) {
      for (uint64_t a : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
        for (uint64_t b : {0x00, 0x7f, 0x80, 0xff}) {
          Tensor t(dtype, n, 1);
          t.fill([=](int64_t i) { return i % 2 ? a : b; });
          check_read<E>(t, name + (" of " + std::to_string(a) + " and " + std::to_string(b)));
          t.set(n / 2, 0x81);
          check_read<E>(t, name + (" but one of " + std::to_string(a)));
        }
      }
    }
  });
}

// As many zeros as a chunk can have in each lane.
void zeros_of_a_whole_chunk() {
  for_each_way([](auto e, DType dtype, const char* name) {
    using E = decltype(e);
    if (dtype == DType::kFloat64 || dtype >= DType::kInt32) return;
    const int64_t n = kMostElements / element_size(dtype);
    for (int64_t other : {int64_t{0}, n / 3, n - 1}) {
      Tensor t(dtype, n);
      t.fill([=](int64_t i) { return i == other ? Pattern(dtype).one : 0; });
      check_read<E>(t, name + (" zeros but one at " + std::to_string(other)));
    }
  });
}

// A NaN or infinity anywhere. Instructions for pairs ignore NaN, so the sums must have it.
void one_that_is_not_finite() {
  for_each_way([](auto e, DType dtype, const char* name) {
    using E = decltype(e);
    if (!oracle::is_float(dtype)) return;
    const oracle::FloatFormat f = oracle::float_format(dtype);
    const uint64_t sign = oracle::sign_bit(dtype);
    const uint64_t infinity = (sign - 1) >> f.mantissa_bits << f.mantissa_bits;
    const int64_t n = kPerVector<E> * kThreads * (E::kLoads + 1) + 3;
    for (uint64_t bits : {infinity, sign | infinity, infinity + 1, sign - 1, sign | (sign - 1)}) {
      for (int64_t i = 0; i < 2 * kPerVector<E> + 3; ++i) {
        for (int64_t at : {i, n - 1 - i, n / 2 + i}) {
          if (i % 5 != 1 && at != n - 1 - i) continue;
          Tensor t(dtype, n, 1);
          t.set(1 + at, bits);
          check_read<E>(t, name + (" pattern " + std::to_string(bits)));
        }
      }
    }
  });
}

}  // namespace

void run_element_tests() {
  RUN(sizes_around_each_loop);
  RUN(ways_with_the_same_loads_have_the_same_bits);
  RUN(every_pattern_of_a_byte);
  RUN(one_extreme_at_each_position);
  RUN(largest_sums);
  RUN(zeros_of_a_whole_chunk);
  RUN(one_that_is_not_finite);
}

}  // namespace paramstats::test
