// A CUDA runtime for machines without one: a .cu file, compiled as C++17 by g++ or clang++, runs on
// the CPU, one fiber per CUDA thread. Slow, and strict where a GPU is lenient: it is there to catch
// what a GPU would hide.
//
//     g++ -std=c++17 -I tests/cpp/cuda_shim -x c++ engine.cu test.cpp tests/cpp/cuda_shim/shim.cpp
//
// Threads of a block take turns at collectives, atomics and __threadfence, in an order drawn from
// set_seed, as is the order of the blocks, which run one after the other. Shared memory is garbage
// when a block starts. A misuse that would hang a GPU or leave a value undefined aborts with
// "cuda_shim: deadlock/divergence: ...". Copies and launches wait until somebody synchronises.
//
// Not caught: races between two collectives, as nothing interrupts a thread there; a spinning
// thread; memory order (every warp collective orders memory, on a GPU only __syncwarp does); legacy
// default-stream order (nullptr is a stream like any other); garbage in the __shared__ variables of
// templates (g++ places them elsewhere). Not offered: dynamic shared memory; __shared__ in inline
// functions that are not static or in an anonymous namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>  // uses an attribute __noinline__, so comes before the macro
#include <tuple>
#include <type_traits>
#include <utility>

#define PARAMSTATS_CUDA_SHIM 1
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_SHIM_ASAN 1
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// `used`, lest the compiler reckons with what it sees written there alone. The sanitizers put no
// redzones into a section of such a name; an index beyond an array is still found.
#define __shared__ static __attribute__((used, section("cuda_shared")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- The device ----

// What the running fiber sees.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_shim {

enum Op {  // in the order of kNames
  kNone,
  kSyncThreads,
  kSyncThreadsOr,
  kSyncThreadsAnd,
  kSyncWarp,
  kBallot,
  kAny,
  kAll,
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor
};

extern int64_t loads;  // that went through __ldg and __ldcs

int block_collective(Op op, bool value);
// A shuffle returns the value of the lane that `argument` leads to; all others the ballot.
uint64_t warp_collective(Op op, unsigned mask, uint64_t value, unsigned argument = 0);
void reschedule();
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<From>::value);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T shuffle(Op op, unsigned mask, T value, unsigned argument, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  if (width != warpSize) die("a shuffle of width %d: only 32 is offered", width);
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return bits<T>(static_cast<Word>(warp_collective(op, mask, bits<Word>(value), argument)));
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::block_collective(cuda_shim::kSyncThreads, false); }
inline int __syncthreads_or(int value) {
  return cuda_shim::block_collective(cuda_shim::kSyncThreadsOr, value != 0);
}
inline int __syncthreads_and(int value) {
  return cuda_shim::block_collective(cuda_shim::kSyncThreadsAnd, value != 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_shim::warp_collective(cuda_shim::kSyncWarp, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  return static_cast<unsigned>(cuda_shim::warp_collective(cuda_shim::kBallot, mask, value != 0));
}
inline int __any_sync(unsigned mask, int value) {
  return cuda_shim::warp_collective(cuda_shim::kAny, mask, value != 0) != 0;
}
inline int __all_sync(unsigned mask, int value) {
  return cuda_shim::warp_collective(cuda_shim::kAll, mask, value != 0) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return cuda_shim::shuffle(cuda_shim::kShfl, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_shim::shuffle(cuda_shim::kShflUp, mask, value, delta, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_shim::shuffle(cuda_shim::kShflDown, mask, value, delta, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  return cuda_shim::shuffle(cuda_shim::kShflXor, mask, value, lanes, width);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(both >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}
inline float __uint_as_float(unsigned x) { return cuda_shim::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_shim::bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_shim::bits<float>(x); }
inline double __longlong_as_double(long long x) { return cuda_shim::bits<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_shim::bits<long long>(x); }
template <class T>
T __ldg(const T* address) {
  ++cuda_shim::loads;
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return __ldg(address);
}
inline void __threadfence() { cuda_shim::reschedule(); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  cuda_shim::reschedule();
  const unsigned before = *address;
  *address = before + value;
  return before;
}

// ---- The host ----

#define CUDA_SHIM_ERRORS(X)                 \
  X(cudaSuccess, 0)                         \
  X(cudaErrorInvalidValue, 1)               \
  X(cudaErrorInvalidConfiguration, 9)       \
  X(cudaErrorInvalidDeviceFunction, 98)     \
  X(cudaErrorInvalidDevice, 101)            \
  X(cudaErrorNoKernelImageForDevice, 209)   \
  X(cudaErrorInvalidResourceHandle, 400)    \
  X(cudaErrorNotReady, 600)                 \
  X(cudaErrorStreamCaptureUnsupported, 900) \
  X(cudaErrorUnknown, 999)
#define CUDA_SHIM_ENUMERATE(name, number) name = number,
enum cudaError_t { CUDA_SHIM_ERRORS(CUDA_SHIM_ENUMERATE) };
#undef CUDA_SHIM_ENUMERATE
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
};
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

namespace cuda_shim {

constexpr int kDevices = 8;

void set_seed(uint64_t seed);
// Do what waits, as time would, without a synchronisation.
void run(cudaStream_t stream);
void run_all();
// While a stream captures, whatever touches it is refused and noted until the next set_capturing.
void set_capturing(cudaStream_t stream, bool capturing);
bool capture_touched();
// After `skip` more runtime calls one fails and does nothing; cudaSuccess calls it off. Calls that
// only tell of errors do not count.
void fail_next(cudaError_t error, int skip = 0);
// Since the process began: runtime calls, and those of each kind that succeeded.
int64_t calls();
int64_t launches();
int64_t copies();
int64_t synchronisations();

cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::function<void()> kernel);
cudaError_t attributes(cudaFuncAttributes* attributes);

template <class... Args, size_t... I>
std::tuple<Args...> copy_arguments(void** args, std::index_sequence<I...>) {
  (void)args;  // there may be none
  return std::tuple<Args...>(*static_cast<Args*>(args[I])...);
}

}  // namespace cuda_shim

template <class... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** args,
                             size_t shared = 0, cudaStream_t stream = nullptr) {
  static_assert((std::is_trivially_copyable<Args>::value && ...));
  auto copy = cuda_shim::copy_arguments<Args...>(args, std::index_sequence_for<Args...>());
  return cuda_shim::launch(grid, block, shared, stream,
                           [kernel, copy] { std::apply(kernel, copy); });
}

template <class... Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Args...)) {
  return cuda_shim::attributes(attributes);
}
