// Tests of the CUDA runtime in cuda_shim: what kernels compute on it, that it detects misuse, and
// that it defers work and reports errors like CUDA.
//
//     make test-cuda-shim
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_runtime.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, dim3 block, cudaStream_t stream,
                   Args... args) {
  void* pointers[] = {&args..., nullptr};
  return cudaLaunchKernel(kernel, grid, block, pointers, 0, stream);
}

template <class... Args>
void run(void (*kernel)(Args...), dim3 grid, dim3 block, Args... args) {
  CHECK(launch(kernel, grid, block, nullptr, args...), cudaSuccess);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
}

// ---- results of kernels ----

struct Results {
  int down, flipped, seventh;
  unsigned ballot, half;
};

__global__ void collectives(Results* results, unsigned* runs) {
  const int lane = static_cast<int>(threadIdx.x % 32), thread = static_cast<int>(threadIdx.x);
  Results& r = results[thread];
  r.down = __shfl_down_sync(kAll, thread, 3);
  r.flipped = __shfl_xor_sync(kAll, thread, 5);
  r.seventh = __shfl_sync(kAll, thread, 7);
  r.ballot = __ballot_sync(kAll, lane % 3 == 0);
  // The halves of a warp diverge and meet again.
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  r.half = 0;
  for (int i = 0; i < (lane < 16 ? 1 : 3); ++i) r.half += __ballot_sync(mask, 1);
  __syncwarp();
  atomicAdd(runs, 1);
}

void collectives_and_atomics() {
  std::vector<Results> results(64);
  unsigned runs = 0;
  run(collectives, 3, 64, results.data(), &runs);
  CHECK(runs, 3u * 64);
  for (int t = 0; t < 64; ++t) {
    check::at("thread " + std::to_string(t));
    const int lane = t % 32;
    CHECK(results[t].down, lane > 28 ? t : t + 3);
    CHECK(results[t].flipped, t - lane + (lane ^ 5));
    CHECK(results[t].seventh, t - lane + 7);
    CHECK(results[t].ballot, 0x49249249u);
    CHECK(results[t].half, lane < 16 ? 0xffffu : 3 * 0xffff0000u);
  }
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x4b70), 0x44337700u);
}

// ---- what is undefined on a GPU varies here ----

__global__ void race(unsigned* result) {
  __shared__ unsigned turn, first[32];
  if (threadIdx.x == 0) result[64 + blockIdx.x] = turn;  // not initialized
  if (threadIdx.x == 0) turn = 0;
  __syncthreads();
  first[threadIdx.x] = turn++;
  __syncwarp();
  result[threadIdx.x] = first[(threadIdx.x + 1) % 32];
  result[32 + threadIdx.x] = blockIdx.x;
}

void the_seed_sets_the_order_of_threads_and_blocks() {
  const auto race_with_seed = [](uint64_t seed) {
    std::vector<unsigned> result(64 + 4);
    cuda_shim::set_seed(seed);
    run(race, 4, 32, result.data());
    for (int i = 0; i < 4; ++i) CHECK(result[64 + i], 0xa5a5a5a5u);
    return result;
  };
  std::set<std::vector<unsigned>> orders;
  std::set<unsigned> last_blocks;
  for (uint64_t seed = 0; seed < 32; ++seed) {
    const std::vector<unsigned> result = race_with_seed(seed);
    CHECK(result == race_with_seed(seed), true);
    orders.insert(result);
    last_blocks.insert(result[63]);
  }
  CHECK(orders.size(), 32u);
  CHECK(last_blocks.size(), 4u);
}

// ---- misuse ----

// Returns what a kernel prints to stderr when it aborts, or "" if it does not abort.
template <class... Args>
std::string abort_message(void (*kernel)(Args...), unsigned block, Args... args) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    run(kernel, 1, block, args...);
    _exit(0);
  }
  close(ends[1]);
  std::string message;
  char part[512];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) message.append(part, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? "" : message;
}

enum Misuse {
  kNone,
  kNotInMask,
  kExitedInMask,
  kReadsOutsideMask,
  kBarrierAfterExit,
  kDifferentWaits,
  kDifferentCollectives,
  kDifferentMasks
};

__global__ void misuse(Misuse what) {
  const bool is_fifth = threadIdx.x == 5;
  const int x = static_cast<int>(threadIdx.x);
  switch (what) {
    case kNone: __syncwarp(); break;
    case kNotInMask: __syncwarp(kAll ^ (is_fifth ? 1u << 5 : 0)); break;
    case kExitedInMask:
      if (!is_fifth) __syncwarp();
      break;
    case kReadsOutsideMask:
      if (x < 16) __shfl_down_sync(0xffffu, x, 1);
      break;
    case kBarrierAfterExit:
      if (!is_fifth) __syncthreads();
      break;
    case kDifferentWaits:
      if (is_fifth) __syncwarp();
      __syncthreads();
      break;
    case kDifferentCollectives:
      is_fifth ? __ballot_sync(kAll, 1) : __shfl_xor_sync(kAll, 1u, 1);
      break;
    case kDifferentMasks: __syncwarp(is_fifth ? 1u << 5 | 1u << 6 : kAll); break;
  }
}

void misuse_aborts() {
  const struct {
    Misuse what;
    unsigned block;
    const char* message;
  } kCases[] = {
      {kNotInMask, 32, "lacks its own lane 5"},
      {kExitedInMask, 32, "exit"},
      {kExitedInMask, 4, "__syncwarp mask 0xffffffff has lanes that have exited"},
      {kReadsOutsideMask, 32, "reads lane 16"},
      {kBarrierAfterExit, 64, "exit"},
      {kDifferentWaits, 64, "all threads wait"},
      {kDifferentCollectives, 32, "thread 5 at __ballot_sync"},
      {kDifferentMasks, 32, "thread 5 at __syncwarp mask 0x00000060"},
  };
  for (const auto& c : kCases) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      cuda_shim::set_seed(seed);
      const std::string message = abort_message(misuse, c.block, c.what);
      check::at("misuse " + std::to_string(c.what) + ": " + message);
      CHECK(message.rfind("cuda_shim: deadlock/divergence: block 0 thread ", 0), 0u);
      CHECK(message.find(c.message) != std::string::npos, true);
    }
  }
  check::at("no misuse");
  CHECK(abort_message(misuse, 64, kNone).empty(), true);
}

// ---- streams ----

__global__ void add(int* x, int n) { *x += n; }

void work_is_deferred() {
  cudaStream_t stream;
  cudaEvent_t event;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  CHECK(cudaEventQuery(event), cudaSuccess);  // never recorded
  const int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies(),
                synchronizations = cuda_shim::synchronizations();
  int from = 1, to = 0, amount = 10;
  int* target = &to;
  void* args[] = {&target, &amount};
  CHECK(cudaMemcpyAsync(&to, &from, sizeof to, cudaMemcpyHostToDevice, stream), cudaSuccess);
  CHECK(cudaLaunchKernel(add, 1, 1, args, 0, stream), cudaSuccess);
  CHECK(cudaEventRecord(event, stream), cudaSuccess);
  CHECK(launch(add, 1, 1, stream, target, 100), cudaSuccess);
  from = 2;      // a copy reads when it runs
  amount = -50;  // arguments are read at the call
  CHECK(cudaEventQuery(event), cudaErrorNotReady);
  CHECK(cudaGetLastError(), cudaErrorNotReady);
  CHECK(to, 0);
  CHECK(cudaEventSynchronize(event), cudaSuccess);
  CHECK(cudaEventQuery(event), cudaSuccess);
  CHECK(to, 12);
  CHECK(cudaStreamQuery(stream), cudaErrorNotReady);
  CHECK(cudaStreamSynchronize(stream), cudaSuccess);
  CHECK(cudaStreamQuery(stream), cudaSuccess);
  CHECK(to, 112);
  CHECK(cuda_shim::launches() - launches, 2);
  CHECK(cuda_shim::copies() - copies, 1);
  CHECK(cuda_shim::synchronizations() - synchronizations, 2);

  // Another stream waits for the record that precedes the wait.
  CHECK(cudaMemsetAsync(&to, 0, sizeof to, stream), cudaSuccess);
  CHECK(cudaEventRecord(event, stream), cudaSuccess);
  CHECK(cudaStreamWaitEvent(nullptr, event, 0), cudaSuccess);
  CHECK(launch(add, 1, 1, nullptr, target, 5), cudaSuccess);
  CHECK(launch(add, 1, 1, stream, target, 7), cudaSuccess);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  CHECK(to, 5);
  cuda_shim::run_all();
  CHECK(to, 12);
  CHECK(cudaEventDestroy(event), cudaSuccess);
}

template <class Body>
bool crashes(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

void kernels_access_pinned_memory_at_another_address() {
  auto* host = static_cast<volatile int*>(cuda_shim::host_alloc(2 * sizeof(int)));
  auto* device = static_cast<int*>(cuda_shim::device_pointer(const_cast<int*>(host)));
  CHECK(device != host, true);
  CHECK(cuda_shim::device_pointer(const_cast<int*>(host) + 1) == device + 1, true);
  host[1] = 3;
  run(add, 1, 1, device + 1, 4);
  CHECK(int{host[1]}, 7);
  CHECK(crashes([=] { *const_cast<volatile int*>(device) = 1; }), true);  // no kernel runs
  CHECK(crashes([=] { run(add, 1, 1, device + 2, 1); }), true);           // beyond the end
  CHECK(crashes([=] { host[2] = 1; }), true);
  CHECK(crashes([=] { run(add, 1, 1, const_cast<int*>(host), 1); }), true);
  int other;
  CHECK(cuda_shim::device_pointer(&other) == &other, true);
  cuda_shim::host_free(const_cast<int*>(host));
  CHECK(crashes([=] { run(add, 1, 1, device, 1); }), true);
}

void errors_are_reported() {
  int x = 0;
  const int64_t launches = cuda_shim::launches();
  for (const dim3 bad : {dim3(0), dim3(0x80000000u), dim3(1, 2), dim3(1, 1, 2)}) {
    CHECK(launch(add, bad, 1, nullptr, &x, 1), cudaErrorInvalidConfiguration);
    CHECK(launch(add, 1, bad, nullptr, &x, 1), cudaErrorInvalidConfiguration);
  }
  CHECK(cudaGetLastError(), cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError(), cudaSuccess);

  cuda_shim::fail_next(cudaErrorUnknown, 1);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  CHECK(launch(add, 1, 1, nullptr, &x, 1), cudaErrorUnknown);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);

  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  CHECK(cudaSetDevice(cuda_shim::kDevices), cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(1), cudaSuccess);
  CHECK(launch(add, 1, 1, stream, &x, 1), cudaErrorInvalidResourceHandle);  // device 0's
  CHECK(cudaSetDevice(0), cudaSuccess);

  cuda_shim::set_capturing(stream, true);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  CHECK(cuda_shim::capture_invalidated(), false);
  CHECK(launch(add, 1, 1, stream, &x, 1), cudaErrorStreamCaptureUnsupported);
  CHECK(cuda_shim::capture_invalidated(), true);
  cuda_shim::set_capturing(stream, false);
  CHECK(cuda_shim::capture_invalidated(), false);
  CHECK(cuda_shim::launches() - launches, 0);
  CHECK(x, 0);
  cudaGetLastError();
}

}  // namespace

int main() {
  RUN(collectives_and_atomics);
  RUN(the_seed_sets_the_order_of_threads_and_blocks);
  RUN(misuse_aborts);
  RUN(work_is_deferred);
  RUN(kernels_access_pinned_memory_at_another_address);
  RUN(errors_are_reported);
  return check::report("cpp cuda shim: kernels, misuse, streams");
}
