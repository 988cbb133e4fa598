// Tests of what the CUDA backend enqueues, of its use of devices, and of its errors. A part of
// test_cuda_kernels.cpp.
#include <string>
#include <vector>

#include "check.h"
#include "cuda_call.h"
#include "oracle.h"

namespace paramstats::test {
namespace {

using cuda::chunk_count;
using cuda::TensorView;

// ---- what is enqueued --------------------------------------------------------------------------

void a_call_does_not_wait() {
  const Tensors tensors = {Tensor(DType::kFloat32, 1000), Tensor(DType::kInt8, 1 << 20)};
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  const int64_t synchronizations = cuda_shim::synchronizations();
  const Call call({view_of(tensors[0]), view_of(tensors[1])}, 0, stream);
  CHECK(call.error, std::string());
  CHECK(cuda_shim::synchronizations() - synchronizations, 0);
  CHECK(cudaStreamQuery(stream), cudaErrorNotReady);
  cuda_shim::run_all();
  CHECK(cudaStreamQuery(stream), cudaSuccess);
}

void concurrent_calls_are_independent() {
  const Tensors first = {Tensor(DType::kFloat32, 70000)}, second = {Tensor(DType::kFloat32, 70000)};
  const Call a({view_of(first[0])}), b({view_of(second[0])});
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  oracle::check_state(a.state(), oracle::truth_of(first[0].values()), oracle::kFloatLanes);
  oracle::check_state(b.state(), oracle::truth_of(second[0].values()), oracle::kFloatLanes);
}

void memory_is_needed_only_for_what_is_used() {
  const auto check = [](int64_t n, const TensorView& view, int64_t host, int64_t device) {
    const Views views(n, view);
    const cuda::Sizes sizes = cuda::sizes({views.data(), n});
    check::at(std::to_string(n) + " of " + std::to_string(view.numel));
    CHECK(sizes.host, host);
    CHECK(sizes.device, device);
  };
  // A state, an entry of zero rows, and a flag per chunk; the entry of a table.
  check(1, {nullptr, 8, DType::kInt8}, 72 + 24 + 8, 0);
  check(169, {nullptr, 8, DType::kInt8}, 169 * (72 + 24) + 176, 0);
  check(170, {nullptr, 8, DType::kInt8}, 170 * (72 + 24 + 24) + 176, 170 * 24);
  check(3, {nullptr, cuda::kSmallChunk + 1, DType::kInt8}, 3 * (72 + 24) + 8, 3 * 2 * 72 + 16);
  check(1, {nullptr, int64_t{0x7fffffff} << 17, DType::kInt8}, 72 + 24 + (int64_t{1} << 31),
        int64_t{0x7fffffff} * 72 + 8);
  // The bits of 8 rows in a word; a distribution.
  check(1, {nullptr, 8, DType::kInt8, 0, 8, 1}, 72 + 24 + 8 + 8, 0);
  check(1, {nullptr, 8, DType::kFloat32, kReadDistribution, 8, 1},
        72 + 24 + 8 + 8 + 112 + 16 * 277 + 24 + 24, 24 + 24 + 48 + 8 * (6 + 2 * 277));
}

// ---- devices and errors ------------------------------------------------------------------------

bool starts_with(const std::string& text, const std::string& start) {
  return text.rfind(start, 0) == 0;
}

// The driver's functions in the order of their calls; the first one that fails ends a call.
void an_error_names_its_function_and_nothing_follows_it() {
  const Tensor small(DType::kFloat32, 10), large(DType::kInt8, cuda::kSmallChunk + 1);
  const struct {
    Views views;
    std::vector<std::string> functions;
  } kCases[] = {
      {{view_of(small)}, {"cuCtxPushCurrent_v2", "cuMemHostGetDevicePointer_v2", "cuLaunchKernel"}},
      {Views(170, view_of(large)),
       {"cuCtxPushCurrent_v2", "cuMemHostGetDevicePointer_v2", "cuMemcpyHtoDAsync_v2",
        "cuLaunchKernel", "cuLaunchKernel"}},
  };
  for (const auto& c : kCases) {
    for (size_t skip = 0; skip < c.functions.size(); ++skip) {
      const Counts counts;
      cuda_shim::fail_next(cudaErrorUnknown, static_cast<int>(skip));
      const Call call(c.views);
      check::at(c.functions[skip]);
      CHECK(call.error, c.functions[skip] + ": cudaErrorUnknown: an error of the shim");
      counts.check(skip == 4, skip >= 3);
      cuda::Context context;
      CHECK(cuda::driver.cuCtxPopCurrent_v2(&context) == cuda::kSuccess, false);  // none is left
      cuda_shim::run_all();
    }
    const Call call(c.views);
    CHECK(call.error, std::string());
    cuda_shim::run_all();
  }
}

void tensors_that_the_kernels_cannot_read() {
  const Tensor t(DType::kFloat32, 10);
  const Counts counts;
  for (int64_t empties : {1, 169, 170}) {
    Views views(empties, view_of(t));
    views.back().numel = 0;
    const Call call(views);
    check::at(std::to_string(empties));
    CHECK(starts_with(call.error, "expected tensors with elements"), true);
  }
  // 2^31 chunks, of which no memory is touched.
  Views views(2, view_of(t));
  for (int64_t more : {int64_t{0}, int64_t{1}}) {
    views[0] = {t.data(), (int64_t{0x7ffffffe} << 17) + more, DType::kInt8};
    CHECK(chunk_count(views[0].numel, DType::kInt8), 0x7ffffffe + more);
  }
  PinnedMemory host(1000);
  const std::string error = cuda::enqueue(0, {views.data(), 2}, host.bytes, nullptr, nullptr);
  CHECK(error,
        std::string("expected tensors with elements, of at most 2147483647 chunks in all, got 10 "
                    "elements in tensor 1 after 2147483647 chunks"));
  counts.check(0, 0);
}

void each_step_of_loading_can_fail() {
  const std::string functions[] = {
      "cuDeviceGet",         "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2",
      "cuModuleLoadData",    "cuModuleGetFunction",      "cuModuleGetFunction",
      "cuModuleGetFunction", "cuModuleGetFunction",      "cuModuleGetFunction"};
  const Tensor t(DType::kFloat32, 10);
  CHECK(Call({view_of(t)}, 1).error,
        std::string("expected a device with kernels, got device 1: no image was loaded"));
  const int contexts = cuda_shim::retained_contexts();
  int modules = cuda_shim::loaded_modules();  // those that were loaded stay: they may be in use
  for (int repetition = 0; repetition < 2; ++repetition) {
    int skip = 0;
    for (const std::string& function : functions) {
      const std::string want = function + ": cudaErrorNoKernelImageForDevice: an error of the shim";
      cuda_shim::fail_next(cudaErrorNoKernelImageForDevice, skip++);
      check::at(want);
      CHECK(cuda::load(1, "image"), want);
      CHECK(cuda_shim::retained_contexts(), contexts + repetition);
      CHECK(cuda_shim::loaded_modules(), modules);
      const Call call({view_of(t)}, 1);
      CHECK(call.error,
            repetition == 1 ? "" : "expected a device with kernels, got device 1: " + want);
      cuda_shim::run_all();
    }
    cuda::Context context;
    CHECK(cuda::driver.cuCtxPopCurrent_v2(&context) == cuda::kSuccess, false);
    for (int images = 0; images < 2; ++images) {
      CHECK(cuda::load(1, "image"), std::string());
      CHECK(cuda_shim::retained_contexts(), contexts + 1);
      CHECK(cuda_shim::loaded_modules(), ++modules);
    }
  }
  CHECK(cuda::load(cuda_shim::kDevices, "image"),
        std::string("cuDeviceGet: cudaErrorInvalidDevice: an error of the shim"));
  CHECK(cuda::load(1, "").rfind("cuModuleLoadData: ", 0), 0u);  // a corrupt image
  CHECK(cuda::load(1, "image"), std::string());
}

// Runs after device 1 was loaded.
void a_call_runs_on_its_device() {
  const Tensor a(DType::kFloat32, 70000), b(DType::kFloat32, 70000);
  const Call first({view_of(a)}, 0), second({view_of(b)}, 1);
  CHECK(first.error + second.error, std::string());
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);  // of device 0
  CHECK(first.state().count, 70000);
  CHECK(second.state().count == 70000, false);
  cuda_shim::run_all();
  oracle::check_state(second.state(), oracle::truth_of(b.values()), oracle::kFloatLanes);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);  // of device 0
  CHECK(Call({view_of(a)}, 1, stream).error,
        std::string("cuLaunchKernel: cudaErrorInvalidResourceHandle: an error of the shim"));
}

void a_driver_without_a_function_is_refused() {
  const std::string missing = cuda::open_driver("libm.so.6");
  CHECK(missing, std::string("libm.so.6 has no cuGetErrorName: install a newer driver"));
  CHECK(cuda::open_driver("libnone.so").find("libnone.so") != std::string::npos, true);
  const Tensor t(DType::kFloat32, 10);
  CHECK(run({view_of(t)}).size(), 1u);  // the driver that was found before is still used
}

}  // namespace

void run_engine_tests() {
  RUN(a_call_does_not_wait);
  RUN(concurrent_calls_are_independent);
  RUN(memory_is_needed_only_for_what_is_used);
  RUN(an_error_names_its_function_and_nothing_follows_it);
  RUN(tensors_that_the_kernels_cannot_read);
  RUN(each_step_of_loading_can_fail);
  RUN(a_call_runs_on_its_device);
  RUN(a_driver_without_a_function_is_refused);
}

}  // namespace paramstats::test
