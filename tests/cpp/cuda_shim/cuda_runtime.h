// A CUDA runtime for machines without CUDA: a .cu file compiled as C++17 by g++ or clang++ runs on
// the CPU, with one fiber per CUDA thread. It is slow, and it is strict where a GPU is lenient, so
// that tests find errors that a GPU would hide.
//
//     g++ -std=c++17 -I tests/cpp/cuda_shim -x c++ kernels.cu test.cpp tests/cpp/cuda_shim/*.cpp
//
// Blocks run one after the other. The threads of a block switch at collectives, atomics and fences.
// Both orders are random; set_seed sets the seed. Shared memory contains garbage when a block
// starts. Misuse that would hang a GPU or give an undefined value aborts with "cuda_shim:
// deadlock/divergence: ...". Copies and launches run only when the program synchronizes. Kernels
// access pinned memory at an address of its own, and only while they run.
//
// Not detected: races between two collectives (nothing interrupts a thread there) and between
// blocks (nothing interrupts a block; only the order of blocks and that of the warps of a block
// vary); threads that spin; errors in memory order, e.g. a missing __threadfence or __ldcg (here
// every store is visible at once and every warp collective orders memory; on a GPU only __syncwarp
// and __syncthreads do); errors in the order of the legacy default stream (here nullptr is a stream
// like any other); reads of uninitialized __shared__ variables in templates (g++ puts them into
// another section). Not supported: everything that the kernels do not use, e.g. dynamic shared
// memory, grids and blocks of more than one dimension, and __shared__ in inline functions that are
// neither static nor in an anonymous namespace.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>  // must come before the macro __noinline__: it uses an attribute of that name
#include <tuple>
#include <type_traits>
#include <utility>

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
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
// All threads share the argument, which they cannot change: `const T __grid_constant__ name`.
#define __grid_constant__ &
// `used` keeps the compiler from assuming that only the visible code writes to it. The sanitizers
// add no redzones in a section with such a name, but still find an index beyond an array.
#define __shared__ static __attribute__((used, section("cuda_shared")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- device functions ----

// Of the running fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_shim {

enum Op { kNone, kSyncThreads, kSyncWarp, kBallot, kShfl, kShflDown, kShflXor };  // as in kNames

extern int64_t loads;  // number of calls of __ldg

void sync_threads();
// Returns the value of the lane that `argument` selects (shuffles), or the ballot.
uint64_t warp_collective(Op op, unsigned mask, uint64_t value, unsigned argument = 0);
void reschedule();

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<From>::value);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T shuffle(Op op, unsigned mask, T value, unsigned argument) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return bits<T>(static_cast<Word>(warp_collective(op, mask, bits<Word>(value), argument)));
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_shim::warp_collective(cuda_shim::kSyncWarp, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  return static_cast<unsigned>(cuda_shim::warp_collective(cuda_shim::kBallot, mask, value != 0));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_shim::shuffle(cuda_shim::kShfl, mask, value, lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return cuda_shim::shuffle(cuda_shim::kShflDown, mask, value, delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_shim::shuffle(cuda_shim::kShflXor, mask, value, lanes);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
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
inline double __longlong_as_double(long long x) { return cuda_shim::bits<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xff) * (b >> 8 * i & 0xff);
  return c;
}

namespace cuda_shim {

// Applies a function to both halves of two words, as integers of type T.
template <class T, class F>
unsigned per_half(unsigned a, unsigned b, F f) {
  unsigned result = 0;
  for (int shift : {0, 16}) {
    const auto half =
        static_cast<uint16_t>(f(static_cast<T>(a >> shift), static_cast<T>(b >> shift)));
    result |= static_cast<unsigned>(half) << shift;
  }
  return result;
}

// The float16 of some bits, and the bits of a value that is a float16.
inline float half_value(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? sign * NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}
inline uint16_t half_bits(float value) {
  if (value != value) return 0x7fff;
  const unsigned sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14f)
    return static_cast<uint16_t>(sign | static_cast<unsigned>(magnitude * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [1/2, 1)
  return static_cast<uint16_t>(sign | static_cast<unsigned>(exponent + 14) << 10 |
                               (static_cast<unsigned>(fraction * 2048) & 1023));
}

// The instructions that csrc/cuda/packed.h writes in PTX.
inline unsigned smaller_halves(unsigned a, unsigned b) {
  return per_half<uint16_t>(a, b, [](uint16_t x, uint16_t y) {
    const float v = half_value(x), w = half_value(y);
    return v != v ? y : w != w ? x : v < w || (v == w && std::signbit(v)) ? x : y;
  });
}
inline unsigned larger_halves(unsigned a, unsigned b) {
  return per_half<uint16_t>(a, b, [](uint16_t x, uint16_t y) {
    const float v = half_value(x), w = half_value(y);
    return v != v ? y : w != w ? x : v > w || (v == w && std::signbit(w)) ? x : y;
  });
}
inline unsigned add_halves(unsigned a, unsigned b) {  // of sums that float16 can represent
  return per_half<uint16_t>(
      a, b, [](uint16_t x, uint16_t y) { return half_bits(half_value(x) + half_value(y)); });
}
inline unsigned zero_halves(unsigned a) {
  return per_half<uint16_t>(a, 0,
                            [](uint16_t x, uint16_t) { return half_value(x) == 0 ? 0x3c00 : 0; });
}

// An 8-bit float with `mantissa_bits`. NaN is what follows the largest mantissa that is a number.
inline uint16_t half_of_byte(unsigned byte, int mantissa_bits, bool has_infinity) {
  const int exponent_bits = 7 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int ones = (1 << exponent_bits) - 1;
  const int exponent = static_cast<int>(byte >> mantissa_bits & static_cast<unsigned>(ones));
  const int mantissa = static_cast<int>(byte & ((1u << mantissa_bits) - 1));
  const float sign = byte & 0x80 ? -1.0f : 1.0f;
  if (exponent == ones && has_infinity) return half_bits(mantissa ? NAN : sign * INFINITY);
  if (exponent == ones && mantissa == (1 << mantissa_bits) - 1) return half_bits(NAN);
  const int whole = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
  return half_bits(std::ldexp(sign * static_cast<float>(whole),
                              (exponent ? exponent : 1) - bias - mantissa_bits));
}
inline unsigned halves_of_e4m3(unsigned pair) {
  return per_half<uint16_t>((pair & 0xff) | (pair & 0xff00) << 8, 0,
                            [](uint16_t x, uint16_t) { return half_of_byte(x, 3, false); });
}
inline unsigned halves_of_e5m2(unsigned pair) {
  return per_half<uint16_t>((pair & 0xff) | (pair & 0xff00) << 8, 0,
                            [](uint16_t x, uint16_t) { return half_of_byte(x, 2, true); });
}

}  // namespace cuda_shim

inline unsigned __vmins2(unsigned a, unsigned b) {
  return cuda_shim::per_half<int16_t>(a, b, [](int16_t x, int16_t y) { return x < y ? x : y; });
}
inline unsigned __vmaxs2(unsigned a, unsigned b) {
  return cuda_shim::per_half<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y ? x : y; });
}
inline unsigned __vminu2(unsigned a, unsigned b) {
  return cuda_shim::per_half<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x < y ? x : y; });
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return cuda_shim::per_half<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y ? x : y; });
}
template <class T>
T __ldg(const T* address) {
  ++cuda_shim::loads;
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline void __threadfence() { cuda_shim::reschedule(); }
template <class T>
T add_atomically(T* address, T value) {
  cuda_shim::reschedule();
  const T before = *address;
  *address = before + value;
  return before;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return add_atomically(address, value);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return add_atomically(address, value);
}
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }

// ---- host functions ----

#define CUDA_SHIM_ERRORS(X)                 \
  X(cudaSuccess, 0)                         \
  X(cudaErrorInvalidConfiguration, 9)       \
  X(cudaErrorInsufficientDriver, 35)        \
  X(cudaErrorInvalidDeviceFunction, 98)     \
  X(cudaErrorInvalidDevice, 101)            \
  X(cudaErrorInvalidKernelImage, 200)       \
  X(cudaErrorNoKernelImageForDevice, 209)   \
  X(cudaErrorInvalidPtx, 218)               \
  X(cudaErrorJitCompilerNotFound, 221)      \
  X(cudaErrorUnsupportedPtxVersion, 222)    \
  X(cudaErrorJitCompilationDisabled, 223)   \
  X(cudaErrorInvalidResourceHandle, 400)    \
  X(cudaErrorNotReady, 600)                 \
  X(cudaErrorIllegalAddress, 700)           \
  X(cudaErrorLaunchFailure, 719)            \
  X(cudaErrorStreamCaptureUnsupported, 900) \
  X(cudaErrorUnknown, 999)
#define CUDA_SHIM_ENUMERATE(name, number) name = number,
enum cudaError_t { CUDA_SHIM_ERRORS(CUDA_SHIM_ENUMERATE) };
#undef CUDA_SHIM_ENUMERATE
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaEventDisableTiming = 2;
struct cudaFuncAttributes {};
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

const char* cudaGetErrorString(cudaError_t error);  // the name of the constant
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

namespace cuda_shim {

constexpr int kDevices = 2;

void set_seed(uint64_t seed);
// Runs the enqueued work of all streams, as if time had passed, without a synchronization.
void run_all();
// Marks a stream as being captured. Calls that would invalidate the capture fail, and
// capture_invalidated() is true until the next set_capturing.
void set_capturing(cudaStream_t stream, bool capturing);
bool capture_invalidated();
// Allocates pinned memory, and returns its address for the host. The device has another one
// (cuMemHostGetDevicePointer). While kernels run, only the latter can be accessed, at other times
// only the former. Every other access, also one beyond the last byte, is a segmentation fault.
void* host_alloc(size_t bytes);
void host_free(void* host);
// The address for the device. Memory that host_alloc did not return has the same one on both.
void* device_pointer(void* host);
// Makes a device current for this thread, as cudaSetDevice does, and returns the previous one. Is
// not a runtime call.
int exchange_device(int device);
// The references to primary contexts, and the modules, that are in use (libcuda.cpp).
int retained_contexts();
int loaded_modules();
// Lets one runtime call fail without an effect, after `skip` more calls. cudaGetLastError and
// cudaGetErrorString do not count.
void fail_next(cudaError_t error, int skip = 0);
// Is called at the next launch, before it is enqueued, and then forgotten.
extern std::function<void()> before_launch;
// The number of runtime calls, and of successful calls of each kind.
int64_t calls();
int64_t launches();
int64_t copies();
int64_t synchronizations();

cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::function<void()> kernel);
cudaError_t succeed();  // or fail, if fail_next was called

template <class... Args, size_t... I>
std::tuple<Args...> copy_arguments(void** args, std::index_sequence<I...>) {
  return std::tuple<Args...>(*static_cast<Args*>(args[I])...);
}

constexpr size_t kParameterBytes = 4096;  // the limit of kernels before CUDA 12.1

}  // namespace cuda_shim

template <class... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** args,
                             size_t shared, cudaStream_t stream) {
  static_assert((std::is_trivially_copyable<std::decay_t<Args>>::value && ...));
  static_assert((sizeof(std::decay_t<Args>) + ... + 0) <= cuda_shim::kParameterBytes);
  auto copy =
      cuda_shim::copy_arguments<std::decay_t<Args>...>(args, std::index_sequence_for<Args...>());
  return cuda_shim::launch(grid, block, shared, stream,
                           [kernel, copy] { std::apply(kernel, copy); });
}

template <class... Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Args...)) {
  return cuda_shim::succeed();
}
