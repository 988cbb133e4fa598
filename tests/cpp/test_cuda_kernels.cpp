// Tests of the CUDA backend on the CPU: runs csrc/cuda with the driver and the kernels of
// tests/cpp/cuda_shim and compares with the oracle. They check indices, unaligned heads and tails,
// merges, dtypes and the order of the enqueued work. They do not check speed, or races between two
// barriers.
//
//     make test-cuda-shim
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/engine.h"
#include "cases.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"

namespace paramstats::test {

using cuda::chunk_size;

// One enqueued call. Its buffers have the exact size, so that the address sanitizer sees any access
// beyond them, and contain garbage. The views are overwritten before anything runs.
struct Call {
  std::unique_ptr<unsigned char[]> host, device;
  int64_t n;
  std::string error;

  explicit Call(const Tensors& tensors, cudaStream_t stream = nullptr)
      : n(static_cast<int64_t>(tensors.size())) {
    std::vector<cuda::TensorView> views;
    for (const Tensor& t : tensors) views.push_back({t.data(), t.numel(), t.dtype});
    const cuda::Sizes sizes = cuda::sizes(views.data(), n);
    host.reset(new unsigned char[sizes.host]);
    device.reset(new unsigned char[sizes.device]);
    std::memset(host.get(), 0xa5, sizes.host);
    std::memset(device.get(), 0xa5, sizes.device);
    error = cuda::enqueue(0, views.data(), n, host.get(), device.get(),
                          reinterpret_cast<cuda::Stream>(stream));
    std::memset(static_cast<void*>(views.data()), 0xa5, n * sizeof(cuda::TensorView));
  }

  std::vector<Moments> states() const {
    const auto* first = reinterpret_cast<const Moments*>(host.get());
    return std::vector<Moments>(first, first + n);
  }
};

std::vector<Result> summarize(const Tensors& tensors) {
  const Call call(tensors);
  CHECK(call.error, std::string());
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  return {{"cuda", call.states()}};
}

std::vector<int64_t> boundary_sizes(DType dtype) {
  const int64_t chunk = chunk_size(dtype);
  return {chunk - 1, chunk, chunk + 1, 3 * chunk - 1, 3 * chunk + 17};
}

namespace {

// ---- chunks ------------------------------------------------------------------------------------

// More chunks than a block has threads, so that each thread merges a run of them.
void a_tensor_of_many_chunks() {
  Tensors tensors;
  tensors.emplace_back(DType::kFloat64, 1030 * chunk_size(DType::kFloat64) + 5, 1);
  for (int64_t chunks : {31, 32, 33, 511, 512, 513}) {
    tensors.emplace_back(DType::kInt64, (chunks - 1) * chunk_size(DType::kInt64) + 7);
  }
  tensors.emplace_back(DType::kFloat32, 3);
  check_all("many chunks", tensors);
}

void every_tensor_finds_its_chunks() {
  const auto dtypes = all_dtypes();
  for (size_t count : {1, 2, 31, 32, 33, 34, 1023, 1025, 2500}) {
    Tensors tensors;
    for (size_t i = 0; i < count; ++i) {
      const DType dtype = dtypes[i * 7 % dtypes.size()];
      const int64_t n = i % 5 == 3 ? 0 : i % 97 == 1 ? chunk_size(dtype) + 9 : rng() % 20;
      tensors.emplace_back(dtype, n, i % 4);
    }
    check_all("one of " + std::to_string(count), tensors);
  }
  check_all("only empty tensors", Tensors(3, Tensor(DType::kFloat32, 0)));
}

// ---- the pivot ---------------------------------------------------------------------------------

// The pivot is the mean of 64 elements. These are their indices.
constexpr int64_t kPivotN = 32 * 1024;  // a chunk of float32, two of float64
bool is_sampled(int64_t i) {
  constexpr int64_t kStride = kPivotN / 64;
  return i % kStride == (i / kStride * 37 + 11) % kStride;
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
    CHECK(loads < c.loads + 0.1, true);
  }
}

// ---- determinism -------------------------------------------------------------------------------

void results_do_not_depend_on_the_schedule_or_the_other_tensors() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    tensors.emplace_back(dtype, 2 * chunk_size(dtype) + 1001, 1);
    tensors.emplace_back(dtype, 37);
  }
  tensors.push_back(
      tensor_of(DType::kFloat32, 5000, [](int64_t i) { return i % 50 ? noise() : kInf; }));
  const auto want = summarize(tensors)[0].states;
  for (uint64_t seed = 1; seed < 4; ++seed) {
    cuda_shim::set_seed(seed);
    const auto got = summarize(tensors)[0].states;
    for (size_t i = 0; i < want.size(); ++i) {
      check::at("seed " + std::to_string(seed) + " " + name_of(tensors[i].dtype));
      CHECK(oracle::same_bits(got[i], want[i]), true);
    }
  }
  for (size_t i = 0; i < want.size(); ++i) {
    check::at("alone " + name_of(tensors[i].dtype));
    CHECK(oracle::same_bits(summarize({tensors[i]})[0].states[0], want[i]), true);
  }
}

// ---- what is enqueued --------------------------------------------------------------------------

void a_call_enqueues_two_launches_and_two_copies_and_does_not_wait() {
  const struct {
    Tensors tensors;
    int64_t launches;
  } kCases[] = {{{Tensor(DType::kFloat32, 1000), Tensor(DType::kInt8, 1 << 20)}, 2},
                {Tensors(2, Tensor(DType::kFloat64, 0)), 1}};  // no chunks
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  for (const auto& c : kCases) {
    const int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies();
    const int64_t synchronizations = cuda_shim::synchronizations();
    const Call call(c.tensors, stream);
    CHECK(call.error, std::string());
    CHECK(cuda_shim::launches() - launches, c.launches);
    CHECK(cuda_shim::copies() - copies, 2);
    CHECK(cuda_shim::synchronizations() - synchronizations, 0);
    CHECK(cudaStreamQuery(stream), cudaErrorNotReady);
    cuda_shim::run_all();
    CHECK(cudaStreamQuery(stream), cudaSuccess);
  }
}

void concurrent_calls_are_independent() {
  const Tensors first = {Tensor(DType::kFloat32, 70000)}, second = {Tensor(DType::kFloat32, 70000)};
  const Call a(first), b(second);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  oracle::check_state(a.states()[0], oracle::truth_of(first[0].values()), oracle::kFloatLanes);
  oracle::check_state(b.states()[0], oracle::truth_of(second[0].values()), oracle::kFloatLanes);
}

void an_error_is_returned_and_nothing_follows_it() {
  const Tensors tensors = {Tensor(DType::kFloat32, 10)};
  for (int skip = 0; skip < 4; ++skip) {
    check::at("call " + std::to_string(skip));
    const int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies();
    cuda_shim::fail_next(cudaErrorUnknown, 2 + skip);  // after the two calls that set the context
    const Call call(tensors);
    CHECK(call.error, std::string("cudaErrorUnknown: an error of the shim"));
    CHECK(cuda_shim::launches() - launches + cuda_shim::copies() - copies, skip);
    cuda_shim::run_all();
  }
}

void each_step_of_loading_can_fail() {
  const char image[] = "not looked at";
  int skip = 1;  // the first call sets the capture mode, which cannot fail
  for (;; ++skip) {
    cuda_shim::fail_next(cudaErrorNoKernelImageForDevice, skip);
    const std::string error = cuda::load(1, image);
    if (error.empty()) break;
    CHECK(error, std::string("cudaErrorNoKernelImageForDevice: an error of the shim"));
  }
  CHECK(skip >= 8, true);
  cuda_shim::fail_next(cudaSuccess);
}

}  // namespace
}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  CHECK(paramstats::cuda::open_driver(nullptr), std::string());  // of this program
  CHECK(paramstats::cuda::load(0, nullptr), std::string());
  run_cases<8>();
  RUN(a_tensor_of_many_chunks);
  RUN(every_tensor_finds_its_chunks);
  RUN(misleading_samples);
  RUN(number_of_reads_per_chunk);
  RUN(results_do_not_depend_on_the_schedule_or_the_other_tensors);
  RUN(a_call_enqueues_two_launches_and_two_copies_and_does_not_wait);
  RUN(concurrent_calls_are_independent);
  RUN(an_error_is_returned_and_nothing_follows_it);
  RUN(each_step_of_loading_can_fail);
  return check::report("cuda kernels on the CPU");
}
