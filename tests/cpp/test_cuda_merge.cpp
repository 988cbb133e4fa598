// Tests of the division of tensors into chunks and groups, and of the order in which their states
// are merged. A part of test_cuda_kernels.cpp.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_call.h"
#include "oracle.h"

namespace paramstats::test {
namespace {

using cuda::chunk_count;
using cuda::chunk_size;
using cuda::TensorView;

constexpr int kGroup = cuda::kGroup;

// ---- the order of merging ----------------------------------------------------------------------

// Merges the states of one warp: runs of adjacent states, then neighbouring runs.
Moments merge_in_order(const std::vector<Moments>& states) {
  const size_t run = (states.size() + 31) / 32;
  Moments lanes[32];
  for (size_t i = 0; i < states.size(); ++i) {
    lanes[i / run] = i % run == 0 ? states[i] : merge(lanes[i / run], states[i]);
  }
  for (int step = 1; step < 32; step *= 2) {
    for (int lane = 0; lane < 32; lane += 2 * step) {
      lanes[lane] = merge(lanes[lane], lanes[lane + step]);
    }
  }
  return lanes[0];
}

std::vector<Moments> merge_groups(const std::vector<Moments>& chunks) {
  std::vector<Moments> groups;
  for (size_t i = 0; i < chunks.size(); i += kGroup) {
    const auto end = chunks.begin() + std::min(i + kGroup, chunks.size());
    groups.push_back(merge_in_order({chunks.begin() + i, end}));
  }
  return groups;
}

// Elements whose sums depend on the order of merging. The means of two neighbouring parts of `part`
// elements differ so much that their difference is rounded, and the next two parts almost cancel
// them, which leaves the rounding errors.
std::vector<double> random_elements(int64_t n, int64_t part) {
  std::vector<double> out(n);
  uint64_t state = rng();
  for (int64_t i = 0; i < n; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const double x = 1 + static_cast<double>(state >> 11) * 0x1p-54;
    out[i] = (i / part % 2 ? x / 77 : x) * (i / part % 4 < 2 ? 1 : -1);
  }
  return out;
}

// Tensors below kLargeTensor: a chunk alone is a tensor with the same chunk.
void small_tensors_merge_in_order() {
  constexpr DType kType = DType::kFloat64;
  constexpr int64_t kChunk = cuda::kSmallChunk / 8, kMost = cuda::kLargeTensor / 8 - 1;
  const std::vector<double> memory = random_elements(kMost, kChunk);
  for (int64_t chunks : {1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128}) {
    for (int64_t last : {int64_t{1}, kChunk - 1, kChunk}) {
      const int64_t n = std::min(kMost, (chunks - 1) * kChunk + last);
      CHECK(chunk_count(n, kType), chunks);
      Views parts;
      for (int64_t i = 0; i < n; i += kChunk) {
        parts.push_back({memory.data() + i, std::min(kChunk, n - i), kType});
      }
      const std::vector<Moments> groups = merge_groups(run(parts));
      const Moments want = groups.size() == 1 ? groups[0] : merge_in_order(groups);
      check::at(std::to_string(chunks) + " chunks, the last one of " + std::to_string(last));
      const Counts counts;
      CHECK(oracle::same_bits(run({{memory.data(), n, kType}})[0], want), true);
      counts.check(chunks > 1 ? 2 : 1, 0);
    }
  }
}

// Larger ones: a full group alone is a tensor with the same chunks. The last group, if it is not
// full, contains a constant, so that its state is the same with any chunks.
void large_tensors_merge_in_order() {
  constexpr DType kType = DType::kFloat64;
  constexpr int64_t kChunk = cuda::kLargeChunk / 8, kGroupSize = kChunk * kGroup;
  std::vector<double> memory = random_elements(33 * kGroupSize, kGroupSize);
  Views parts;
  for (int64_t i = 0; i < 33 * kGroupSize; i += kGroupSize) {
    parts.push_back({memory.data() + i, kGroupSize, kType});
  }
  std::vector<Moments> groups = run(parts);
  for (int64_t chunks : {33 * 32, 1025, 1024, 64, 33, 32}) {
    const int64_t n = chunks * kChunk, full = chunks / kGroup, rest = n - full * kGroupSize;
    std::fill(memory.begin() + full * kGroupSize, memory.begin() + n, 0.375);
    groups.resize(full);
    if (rest > 0) groups.push_back(run({{memory.data() + full * kGroupSize, rest, kType}})[0]);
    const Moments want = full == 1 && rest == 0 ? groups[0] : merge_in_order(groups);
    for (uint64_t seed = 0; seed < (chunks < 100 ? 4 : 1); ++seed) {
      cuda_shim::set_seed(seed);
      check::at(std::to_string(chunks) + " large chunks");
      CHECK(chunk_count(n, kType), chunks);
      CHECK(oracle::same_bits(run({{memory.data(), n, kType}})[0], want), true);
    }
  }
}

// The size of chunks changes between these sizes.
void tensors_around_the_limit_of_small_chunks() {
  for (DType dtype : {DType::kFloat64, DType::kUInt16}) {
    for (int64_t more : {-1, 0, 1}) {
      const Tensor t(dtype, cuda::kLargeTensor / element_size(dtype) + more, 1);
      check::at(name_of(dtype) + " " + std::to_string(more));
      CHECK(chunk_count(t.numel(), dtype), more < 0 ? 128 : 32 + more);
      oracle::check_state(cuda_states({t})[0], oracle::truth_of(t.values()), bounds(dtype));
    }
  }
}

void results_do_not_depend_on_the_schedule_or_the_other_tensors() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    tensors.emplace_back(dtype, 2 * chunk_size(1, dtype) + 1001, 1);
    tensors.emplace_back(dtype, 37);
  }
  tensors.emplace_back(DType::kFloat32, 5000);
  for (int64_t i = 0; i < 5000; i += 50) tensors.back().set(i, 0x7f800000);  // infinity
  const std::vector<Moments> want = cuda_states(tensors);
  for (uint64_t seed = 1; seed < 4; ++seed) {
    cuda_shim::set_seed(seed);
    const std::vector<Moments> got = cuda_states(tensors);
    for (size_t i = 0; i < want.size(); ++i) {
      check::at("seed " + std::to_string(seed) + " " + name_of(tensors[i].dtype));
      CHECK(oracle::same_bits(got[i], want[i]), true);
    }
  }
  for (size_t i = 0; i < want.size(); ++i) {
    check::at("alone " + name_of(tensors[i].dtype));
    CHECK(oracle::same_bits(cuda_states({tensors[i]})[0], want[i]), true);
  }
}

// ---- tables ------------------------------------------------------------------------------------

// Tensor t contains the constant t + 1, which identifies it. `size_of` returns numbers of elements.
template <class SizeOf>
void check_table(int64_t tensors, SizeOf size_of) {
  constexpr DType kTypes[] = {DType::kUInt32, DType::kInt64, DType::kUInt16, DType::kFloat64};
  std::vector<std::vector<unsigned char>> memory(tensors);
  Views views;
  bool merges = false;
  for (int64_t t = 0; t < tensors; ++t) {
    const DType dtype = kTypes[t % 4];
    const int64_t n = size_of(t, dtype), size = element_size(dtype);
    const double as_double = static_cast<double>(t + 1);
    const uint64_t bits = dtype == DType::kFloat64 ? cuda_shim::bits<uint64_t>(as_double) : t + 1;
    memory[t].resize(n * size);
    for (int64_t i = 0; i < n; ++i) std::memcpy(memory[t].data() + i * size, &bits, size);
    views.push_back({memory[t].data(), n, dtype});
    merges = merges || chunk_count(n, dtype) > 1;
  }
  const Counts counts;
  const std::vector<Moments> states = run(views);
  counts.check(merges ? 2 : 1, tensors > cuda::kInlineEntries ? 1 : 0);
  for (int64_t t = 0; t < tensors; ++t) {
    const double value = static_cast<double>(t + 1);
    const Moments want = {views[t].numel, 0, 0, 0, 0, value, 0, value, value};
    check::at("tensor " + std::to_string(t) + " of " + std::to_string(tensors));
    CHECK(oracle::same_bits(states[t], want), true);
  }
}

void every_tensor_finds_its_chunks_and_groups() {
  const auto tiny = [](int64_t t, DType) { return 1 + t % 20; };
  const auto mixed = [](int64_t t, DType dtype) {  // at every place of a table, also the ends
    const int64_t chunk = chunk_size(1, dtype);
    return t % 7 == 3     ? chunk + t  // two chunks
           : t % 150 == 0 ? 33 * chunk + 5
                          : t % 20 + 1;
  };
  const auto several = [](int64_t t, DType dtype) { return (2 + t % 3) * chunk_size(1, dtype); };
  for (int64_t tensors : {1, 2, 3, 31, 32, 33, 34, 126, 127, 128, 168, 169, 170, 171, 172, 1025}) {
    check_table(tensors, tiny);
  }
  for (int64_t tensors : {1, 2, 3, 33, 34, 128, 169, 170, 172, 1023, 1024}) {
    check_table(tensors, mixed);
  }
  for (int64_t tensors : {2, 33, 170}) check_table(tensors, several);
  check_table(5000, tiny);
}

}  // namespace

void run_merge_tests() {
  RUN(small_tensors_merge_in_order);
  RUN(large_tensors_merge_in_order);
  RUN(tensors_around_the_limit_of_small_chunks);
  RUN(results_do_not_depend_on_the_schedule_or_the_other_tensors);
  RUN(every_tensor_finds_its_chunks_and_groups);
}

}  // namespace paramstats::test
