// Tests of what the CUDA backend enqueues, of the order in which it merges, and of its errors. A
// part of test_cuda_kernels.cpp.
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
using Views = std::vector<TensorView>;

constexpr int kGroup = cuda::kGroup;

// What a call enqueues.
struct Counts {
  int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies();
  void check(int64_t more_launches, int64_t more_copies) const {
    CHECK(cuda_shim::launches() - launches, more_launches);
    CHECK(cuda_shim::copies() - copies, more_copies);
  }
};

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

std::vector<uint64_t> random_elements(int64_t n) {
  std::vector<uint64_t> out(n);
  uint64_t state = rng();
  for (int64_t i = 0; i < n; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    // The chunks have different means of more bits than double has. So the order of merging
    // changes the last bits.
    out[i] = (state >> 17) + ((i >> 12) * (i >> 12) % 977 << 40);
  }
  return out;
}

// Tensors below kLargeTensor: a chunk alone is a tensor with the same chunk.
void small_tensors_merge_in_order() {
  constexpr DType kType = DType::kInt64;
  constexpr int64_t kChunk = cuda::kSmallChunk / 8, kMost = cuda::kLargeTensor / 8 - 1;
  const std::vector<uint64_t> memory = random_elements(kMost);
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
  constexpr DType kType = DType::kInt64;
  constexpr int64_t kChunk = cuda::kLargeChunk / 8, kGroupSize = kChunk * kGroup;
  std::vector<uint64_t> memory = random_elements(33 * kGroupSize);
  Views parts;
  for (int64_t i = 0; i < 33 * kGroupSize; i += kGroupSize) {
    parts.push_back({memory.data() + i, kGroupSize, kType});
  }
  std::vector<Moments> groups = run(parts);
  for (int64_t chunks : {33 * 32, 1025, 1024, 64, 33, 32}) {
    const int64_t n = chunks * kChunk, full = chunks / kGroup, rest = n - full * kGroupSize;
    std::fill(memory.begin() + full * kGroupSize, memory.begin() + n, 12345);
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
    const cuda::Sizes sizes = cuda::sizes(views.data(), n);
    check::at(std::to_string(n) + " of " + std::to_string(view.numel));
    CHECK(sizes.host, host);
    CHECK(sizes.device, device);
  };
  check(1, {nullptr, 8, DType::kInt8}, 72, 0);
  check(169, {nullptr, 8, DType::kInt8}, 169 * 72, 0);
  check(170, {nullptr, 8, DType::kInt8}, 170 * (72 + 24), 170 * 24);
  check(3, {nullptr, cuda::kSmallChunk + 1, DType::kInt8}, 3 * 72, 3 * (2 * 72 + 4));
  check(1, {nullptr, int64_t{0x7fffffff} << 17, DType::kInt8}, 72, int64_t{0x7fffffff} * 72 + 4);
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
  const std::string error = cuda::enqueue(0, views.data(), 2, host.bytes, nullptr, nullptr);
  CHECK(error,
        std::string("expected tensors with elements, of at most 2147483647 chunks in all, got 10 "
                    "elements in tensor 1 after 2147483647 chunks"));
  counts.check(0, 0);
}

void each_step_of_loading_can_fail() {
  const std::string functions[] = {"cuDeviceGet",         "cuDevicePrimaryCtxRetain",
                                   "cuCtxPushCurrent_v2", "cuLibraryLoadData",
                                   "cuLibraryGetKernel",  "cuKernelGetFunction",
                                   "cuLibraryGetKernel",  "cuKernelGetFunction"};
  const Tensor t(DType::kFloat32, 10);
  CHECK(Call({view_of(t)}, 1).error,
        std::string("expected a device with kernels, got device 1: no image was loaded"));
  const int contexts = cuda_shim::retained_contexts();
  int libraries = cuda_shim::loaded_libraries();  // those that were loaded stay: they may be in use
  for (int repetition = 0; repetition < 2; ++repetition) {
    int skip = 0;
    for (const std::string& function : functions) {
      const std::string want = function + ": cudaErrorNoKernelImageForDevice: an error of the shim";
      cuda_shim::fail_next(cudaErrorNoKernelImageForDevice, skip++);
      check::at(want);
      CHECK(cuda::load(1, ""), want);
      CHECK(cuda_shim::retained_contexts(), contexts);
      CHECK(cuda_shim::loaded_libraries(), libraries);
      CHECK(Call({view_of(t)}, 1).error, "expected a device with kernels, got device 1: " + want);
    }
    cuda::Context context;
    CHECK(cuda::driver.cuCtxPopCurrent_v2(&context) == cuda::kSuccess, false);
    for (int images = 0; images < 2; ++images) {
      CHECK(cuda::load(1, ""), std::string());
      CHECK(cuda_shim::retained_contexts(), contexts + 1);
      CHECK(cuda_shim::loaded_libraries(), ++libraries);
    }
  }
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
  CHECK(missing,
        std::string("libm.so.6 has no cuGetErrorName: it needs a driver for CUDA 12.0 or later"));
  CHECK(cuda::open_driver("libnone.so").find("libnone.so") != std::string::npos, true);
  const Tensor t(DType::kFloat32, 10);
  CHECK(run({view_of(t)}).size(), 1u);  // the driver that was found before is still used
}

}  // namespace

void run_engine_tests() {
  RUN(small_tensors_merge_in_order);
  RUN(large_tensors_merge_in_order);
  RUN(tensors_around_the_limit_of_small_chunks);
  RUN(results_do_not_depend_on_the_schedule_or_the_other_tensors);
  RUN(every_tensor_finds_its_chunks_and_groups);
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
