// Tests of the CUDA backend on the CPU: runs csrc/cuda with the driver and the kernels of
// tests/cpp/cuda_shim and compares with the oracle. They check indices, unaligned heads and tails,
// merges, dtypes and the order of the enqueued work. They do not check speed, or races between two
// barriers.
//
//     make test-cuda-shim
#include <cuda_runtime.h>

#include <cmath>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "cuda_call.h"
#include "oracle.h"

namespace paramstats::test {

void run_element_tests();  // test_cuda_elements.cpp

std::vector<Result> summarize(const Tensors& tensors) { return {{"cuda", cuda_states(tensors)}}; }

std::vector<int64_t> boundary_sizes(DType dtype) {
  const int64_t chunk = cuda::chunk_size(1, dtype);
  return {chunk - 1, chunk, chunk + 1, 3 * chunk - 1, 3 * chunk + 17};
}

namespace {

// ---- the pivot ---------------------------------------------------------------------------------

// The pivot is the mean of 64 elements, one of each 64th of a chunk. These are their indices.
constexpr int64_t kPivotN = cuda::kSmallChunk / 4;  // a chunk of float32, two of float64
bool is_sampled(int64_t i) {
  const uint64_t k = i / (kPivotN / 64);
  const uint64_t position = (k << 26) + ((k + 1) * 0x9e3779b9u % (uint64_t{1} << 32) >> 6);
  return static_cast<uint64_t>(i) == position * kPivotN >> 32;
}

// Samples that differ from the rest: the chunk must be read again. The bounds are tight because
// rounding to float32 once per tile hides much of the effect of a bad pivot.
void misleading_samples() {
  static constexpr oracle::Bounds kTight = {1e-6, 1e-6, 1e-6};
  for (double (*value_at)(int64_t) : {
           +[](int64_t i) { return is_sampled(i) ? 1e4 : 3 + noise(); },
           +[](int64_t i) { return is_sampled(i) ? kNaN : noise(); },
           +[](int64_t i) { return is_sampled(i) ? 3e38 : 3e38 * (i % 2); },
           +[](int64_t i) { return is_sampled(i) ? 0.0 : 1000 + 0.02 * noise(); },
           +[](int64_t i) { return is_sampled(i) ? 1e30 : 1e-3 * noise(); },
       }) {
    check_all("misleading sample",
              {tensor_of(DType::kFloat32, kPivotN, value_at),
               tensor_of(DType::kFloat64, kPivotN, value_at)},
              &kTight);
  }
}

// The number of loads shows which path the kernel takes: one load per 16 bytes with a good pivot,
// two if the sample misleads, and four more (one per element) if float32 cannot hold the sums.
void number_of_reads_per_chunk() {
  const struct {
    const char* name;
    double (*value_at)(int64_t);
    double loads;  // per 16 bytes
  } kCases[] = {
      {"noise", [](int64_t) { return noise(); }, 1},
      {"a mean far from zero", [](int64_t) { return 1000 + 0.02 * noise(); }, 1},
      {"a different first element", [](int64_t i) { return i == 0 ? 9.0 : 1e-3 * noise(); }, 1},
      {"columns of powers of two", [](int64_t i) { return i % 512 == 0 ? 50.0 : noise(); }, 1},
      {"large", [](int64_t) { return 1e16 * noise(); }, 1},
      {"a misleading sample", [](int64_t i) { return is_sampled(i) ? 1e4 : noise(); }, 2},
      {"a sample one std away", [](int64_t i) { return is_sampled(i) ? 1 : noise(); }, 2},
      {"squares too large", [](int64_t) { return 1e30 * noise(); }, 5},
      {"squares too small", [](int64_t) { return 1e-30 * noise(); }, 5},
      {"a NaN", [](int64_t i) { return i == 77 ? kNaN : noise(); }, 5},
  };
  for (const auto& c : kCases) {
    const Tensors tensors = {tensor_of(DType::kFloat32, kPivotN, c.value_at)};
    const int64_t before = cuda_shim::loads;
    summarize(tensors);
    check::at(c.name);
    // Each thread also loads the sample, and the first element with each read.
    const double loads = static_cast<double>(cuda_shim::loads - before) / (kPivotN / 4);
    CHECK(std::floor(loads), c.loads);
    CHECK(loads < c.loads + 0.5, true);
  }
}

}  // namespace
}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  CHECK(paramstats::cuda::open_driver(nullptr), std::string());  // of this program
  CHECK(paramstats::cuda::load(0, nullptr), std::string());
  run_cases<32>();
  RUN(misleading_samples);
  RUN(number_of_reads_per_chunk);
  run_element_tests();
  run_merge_tests();
  run_engine_tests();
  run_update_tests();
  run_detail_tests();
  return check::report("cuda kernels on the CPU");
}
