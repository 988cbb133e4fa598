// The CUDA runtime that runs on the CPU: what it computes, and that it catches what it says it
// does.
//
//     g++ -std=c++17 -O2 -I tests/cpp/cuda_shim tests/cpp/test_cuda_shim.cpp
//         tests/cpp/cuda_shim/shim.cpp -o build/test_cuda_shim && build/test_cuda_shim
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

// ---- What kernels compute ----

__device__ __forceinline__ double warp_sum(double x) {
  for (int step = warpSize / 2; step > 0; step /= 2) x += __shfl_down_sync(kAll, x, step);
  return x;
}

__global__ void __launch_bounds__(256) sums(const double* __restrict__ x, double* result) {
  __shared__ double partial[8];
  const unsigned thread = threadIdx.x;
  const double sum = warp_sum(__ldg(&x[blockIdx.x * blockDim.x + thread]));
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread >= 32) return;
  const double total = warp_sum(thread < blockDim.x / 32 ? partial[thread] : 0.0);
  if (thread == 0) result[blockIdx.x] = total;
}

void blocks_add_up() {
  constexpr unsigned kGrid = 5;
  for (const unsigned block : {32u, 96u, 256u}) {
    std::vector<double> x(kGrid * block), got(kGrid), want(kGrid);
    for (unsigned i = 0; i < x.size(); ++i) want[i / block] += x[i] = i * i % 1009;
    for (uint64_t seed = 0; seed < 10; ++seed) {
      cuda_shim::set_seed(seed);
      run<const double*, double*>(sums, kGrid, block, x.data(), got.data());
      for (unsigned i = 0; i < kGrid; ++i) CHECK(got[i], want[i]);
    }
  }
}

struct Answers {
  int shfl, up, down, flip, any, all, some, both, either;
  unsigned ballot, half;
};

__global__ void collectives(Answers* answers) {
  const int lane = static_cast<int>(threadIdx.x % 32), thread = static_cast<int>(threadIdx.x);
  Answers& a = answers[thread];
  a.shfl = __shfl_sync(kAll, thread, lane + 3);
  a.up = __shfl_up_sync(kAll, thread, 3);
  a.down = __shfl_down_sync(kAll, thread, 3);
  a.flip = __shfl_xor_sync(kAll, thread, 5);
  a.any = __any_sync(kAll, thread == 40);
  a.all = __all_sync(kAll, thread != 40);
  a.some = __any_sync(kAll, 0);
  a.ballot = __ballot_sync(kAll, lane % 3 == 0);
  // The halves of a warp go their own ways for a while.
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  a.half = 0;
  for (int i = 0; i < (lane < 16 ? 1 : 3); ++i) a.half += __ballot_sync(mask, 1);
  __syncwarp();
  a.both = __syncthreads_and(thread < 64);
  a.either = __syncthreads_or(thread == 63 ? 8 : 0);
}

void collectives_answer() {
  std::vector<Answers> answers(64);
  run(collectives, 1, 64, answers.data());
  for (int t = 0; t < 64; ++t) {
    check::at("thread " + std::to_string(t));
    const Answers& a = answers[t];
    const int lane = t % 32, base = t - lane;
    CHECK(a.shfl, base + (lane + 3) % 32);
    CHECK(a.up, lane < 3 ? t : t - 3);
    CHECK(a.down, lane > 28 ? t : t + 3);
    CHECK(a.flip, base + (lane ^ 5));
    CHECK(a.any, t >= 32);
    CHECK(a.all, t < 32);
    CHECK(a.some, 0);
    CHECK(a.ballot, 0x49249249u);
    CHECK(a.half, lane < 16 ? 0xffffu : 3 * 0xffff0000u);
    CHECK(a.both, 1);
    CHECK(a.either, 1);
  }
}

__global__ void places(unsigned* seen) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  atomicAdd(&seen[block * 30 + thread], 1);
}

void every_thread_runs_once() {
  std::vector<unsigned> seen(24 * 30);
  run(places, dim3(2, 3, 4), dim3(5, 3, 2), seen.data());
  for (const unsigned n : seen) CHECK(n, 1u);
}

void bits() {
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x7210), 0x77221100u);
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x4bf0), 0x44337700u);
  CHECK(__clz(0), 32);
  CHECK(__clz(-1), 0);
  CHECK(__ffs(8), 4);
  CHECK(__popc(kAll) + __popcll(~0ull), 96);
  CHECK(__uint_as_float(__float_as_uint(1.5f)), 1.5f);
  CHECK(__longlong_as_double(__double_as_longlong(-0.1)), -0.1);
  CHECK(alignof(uint4) + alignof(float4) + alignof(uint2), 40u);
}

// ---- What depends on luck shows it ----

__global__ void race(unsigned* result) {
  __shared__ unsigned turn, first[32];
  if (threadIdx.x == 0) turn = 0;
  __syncthreads();
  first[threadIdx.x] = turn++;
  __syncwarp();
  result[threadIdx.x] = first[(threadIdx.x + 1) % 32];
  result[32 + threadIdx.x] = blockIdx.x;
}

std::vector<unsigned> raced(uint64_t seed) {
  std::vector<unsigned> result(64);
  cuda_shim::set_seed(seed);
  run(race, 4, 32, result.data());
  return result;
}

void schedules_follow_the_seed() {
  std::set<std::vector<unsigned>> orders;
  std::set<unsigned> last_blocks;
  for (uint64_t seed = 0; seed < 32; ++seed) {
    const std::vector<unsigned> result = raced(seed);
    CHECK(result == raced(seed), true);
    orders.insert(result);
    last_blocks.insert(result.back());
  }
  CHECK(orders.size(), 32u);
  CHECK(last_blocks.size(), 4u);
}

__global__ void peek(unsigned* result) {
  __shared__ unsigned left;
  result[blockIdx.x] = left;
  left = 0;
}

void shared_memory_starts_as_garbage() {
  std::vector<unsigned> result(3);
  run(peek, 3, 1, result.data());
  for (const unsigned x : result) CHECK(x, 0xa5a5a5a5u);
}

// ---- Misuse ----

// What a kernel says when it dies, or "" if it does not.
template <class... Args>
std::string last_words(void (*kernel)(Args...), unsigned block, Args... args) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    run(kernel, 1, block, args...);
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char part[512];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) words.append(part, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? "" : words;
}

enum Misuse {
  kNone,
  kNotInMask,
  kExitedInMask,
  kOutsideMask,
  kBarrierAfterExit,
  kWaitElsewhere,
  kOtherKind,
  kOtherMask,
  kOtherBarrier,
  kWidth
};

__global__ void misuse(Misuse what) {
  const bool odd_one = threadIdx.x == 5;
  const int x = static_cast<int>(threadIdx.x);
  switch (what) {
    case kNone: __syncwarp(); break;
    case kNotInMask: __syncwarp(kAll ^ (odd_one ? 1u << 5 : 0)); break;
    case kExitedInMask:
      if (!odd_one) __syncwarp();
      break;
    case kOutsideMask:
      if (x < 16) __shfl_down_sync(0xffffu, x, 1);
      break;
    case kBarrierAfterExit:
      if (!odd_one) __syncthreads();
      break;
    case kWaitElsewhere:
      if (odd_one) __syncwarp();
      __syncthreads();
      break;
    case kOtherKind: odd_one ? __any_sync(kAll, 1) : __all_sync(kAll, 1); break;
    case kOtherMask: __syncwarp(odd_one ? 1u << 5 | 1u << 6 : kAll); break;
    case kOtherBarrier: odd_one ? __syncthreads_or(1) : __syncthreads_and(1); break;
    case kWidth: __shfl_sync(kAll, x, 0, 16); break;
  }
}

void misuse_is_caught() {
  const struct {
    Misuse what;
    unsigned block;
    const char* words;
  } cases[] = {
      {kNotInMask, 32, "lacks its own lane 5"},
      {kExitedInMask, 32, "exit"},
      {kExitedInMask, 4, "__syncwarp mask 0xffffffff names lanes that have exited"},
      {kOutsideMask, 32, "reads lane 16"},
      {kBarrierAfterExit, 64, "exit"},
      {kWaitElsewhere, 64, "no thread can go on"},
      {kOtherKind, 32, "thread (5,0,0) at __any_sync"},
      {kOtherMask, 32, "thread (5,0,0) at __syncwarp mask 0x00000060"},
      {kOtherBarrier, 64, "while others wait at __syncthreads_"},
      {kWidth, 32, "only 32"},
  };
  for (const auto& c : cases) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      cuda_shim::set_seed(seed);
      const std::string words = last_words(misuse, c.block, c.what);
      check::at("misuse " + std::to_string(c.what) + ": " + words);
      CHECK(words.rfind("cuda_shim: deadlock/divergence: block (0,0,0) thread (", 0), 0u);
      CHECK(words.find(c.words) != std::string::npos, true);
    }
  }
  check::at("no misuse");
  CHECK(last_words(misuse, 64, kNone).empty(), true);
}

__global__ void read_local(int index) {
  int local[4] = {1, 2, 3, 4};
  int* volatile hidden = local;
  for (int i = 0; i < 3; ++i) __syncthreads();
  volatile int read = hidden[index];
  (void)read;
}

// The sanitizer still knows a fiber's stack after the fiber has waited.
void stacks_are_watched() {
  CHECK(last_words(read_local, 64, 3).empty(), true);
#ifdef CUDA_SHIM_ASAN
  const std::string words = last_words(read_local, 64, 4);
  check::at(words);
  CHECK(words.find("stack-buffer-overflow") != std::string::npos, true);
#endif
}

// ---- Streams ----

__global__ void add(int* x, int n) { *x += n; }

void work_waits() {
  cudaStream_t stream;
  cudaEvent_t event;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  CHECK(cudaEventQuery(event), cudaSuccess);  // never recorded
  const int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies(),
                synchronisations = cuda_shim::synchronisations();
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
  CHECK(cuda_shim::synchronisations() - synchronisations, 2);

  // Another stream waits for the event's last record before the wait.
  CHECK(cudaMemsetAsync(&to, 0, sizeof to, stream), cudaSuccess);
  CHECK(cudaEventRecord(event, stream), cudaSuccess);
  CHECK(cudaStreamWaitEvent(nullptr, event, 0), cudaSuccess);
  CHECK(launch(add, 1, 1, nullptr, target, 5), cudaSuccess);
  CHECK(launch(add, 1, 1, stream, target, 7), cudaSuccess);
  cuda_shim::run(nullptr);
  CHECK(to, 5);
  cuda_shim::run_all();
  CHECK(to, 12);
  CHECK(cudaEventDestroy(event), cudaSuccess);
  CHECK(cudaStreamDestroy(stream), cudaSuccess);
  CHECK(cudaStreamDestroy(stream), cudaErrorInvalidResourceHandle);
  cudaGetLastError();
}

void errors_are_told() {
  int x = 0;
  const int64_t launches = cuda_shim::launches();
  for (const dim3 bad : {dim3(0), dim3(0x80000000u), dim3(1, 65536)}) {
    CHECK(launch(add, bad, 1, nullptr, &x, 1), cudaErrorInvalidConfiguration);
  }
  for (const dim3 bad : {dim3(0), dim3(1025), dim3(32, 33), dim3(65536, 65536), dim3(1, 1, 65)}) {
    CHECK(launch(add, 1, bad, nullptr, &x, 1), cudaErrorInvalidConfiguration);
  }
  CHECK(cudaPeekAtLastError(), cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError(), cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError(), cudaSuccess);
  CHECK(cudaMemcpyAsync(nullptr, &x, 4, cudaMemcpyDefault), cudaErrorInvalidValue);
  CHECK(cudaGetErrorName(cudaGetLastError()), std::string("cudaErrorInvalidValue"));

  cuda_shim::fail_next(cudaErrorUnknown, 1);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  CHECK(launch(add, 1, 1, nullptr, &x, 1), cudaErrorUnknown);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  cuda_shim::fail_next(cudaErrorNoKernelImageForDevice);
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, add), cudaErrorNoKernelImageForDevice);
  CHECK(cudaFuncGetAttributes(&attributes, add), cudaSuccess);
  CHECK(attributes.maxThreadsPerBlock, 1024);

  int device = -1;
  CHECK(cudaSetDevice(cuda_shim::kDevices), cudaErrorInvalidDevice);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  CHECK(cudaSetDevice(1), cudaSuccess);
  CHECK(cudaGetDevice(&device), cudaSuccess);
  CHECK(device, 1);
  CHECK(launch(add, 1, 1, stream, &x, 1), cudaErrorInvalidResourceHandle);  // device 0's
  CHECK(cudaSetDevice(0), cudaSuccess);
  CHECK(cudaStreamDestroy(stream), cudaSuccess);
  CHECK(cuda_shim::launches() - launches, 0);
  CHECK(x, 0);
  cudaGetLastError();
}

void a_capture_is_left_alone() {
  cudaStream_t stream;
  cudaStreamCaptureStatus status;
  int x = 0;
  CHECK(cudaStreamCreate(&stream), cudaSuccess);
  cuda_shim::set_capturing(stream, true);
  CHECK(cudaStreamIsCapturing(stream, &status), cudaSuccess);
  CHECK(status, cudaStreamCaptureStatusActive);
  CHECK(cudaStreamIsCapturing(nullptr, &status), cudaSuccess);
  CHECK(status, cudaStreamCaptureStatusNone);
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  CHECK(cuda_shim::capture_touched(), false);
  CHECK(launch(add, 1, 1, stream, &x, 1), cudaErrorStreamCaptureUnsupported);
  CHECK(cuda_shim::capture_touched(), true);
  cuda_shim::set_capturing(stream, true);
  CHECK(cudaMemcpyAsync(&x, &x, 4, cudaMemcpyDefault, stream), cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
  CHECK(cuda_shim::capture_touched(), true);
  cuda_shim::set_capturing(stream, false);
  CHECK(cudaStreamSynchronize(stream), cudaSuccess);
  CHECK(cuda_shim::capture_touched(), false);
  CHECK(cudaStreamDestroy(stream), cudaSuccess);
  cudaGetLastError();
}

}  // namespace

int main() {
  RUN(blocks_add_up);
  RUN(collectives_answer);
  RUN(every_thread_runs_once);
  RUN(bits);
  RUN(schedules_follow_the_seed);
  RUN(shared_memory_starts_as_garbage);
  RUN(misuse_is_caught);
  RUN(stacks_are_watched);
  RUN(work_waits);
  RUN(errors_are_told);
  RUN(a_capture_is_left_alone);
  return check::report("cpp cuda shim: kernels, misuse, streams");
}
