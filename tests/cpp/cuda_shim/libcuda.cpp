// The functions of libcuda that csrc/cuda/driver.h names, on top of the shim. The kernels are those
// of csrc/cuda/kernels.h, compiled for the CPU: a loaded image is not looked at, but an empty one
// is refused.
#include <cuda_runtime.h>

#include <deque>
#include <string>
#include <vector>

#include "../../../csrc/cuda/driver.h"
#include "../../../csrc/cuda/kernels.h"

namespace {

using namespace paramstats::cuda;  // NOLINT: the types of the driver

// A kernel, and how to launch it.
struct CompiledKernel {
  const char* name;
  cudaError_t (*launch)(dim3 grid, dim3 block, unsigned shared, void** arguments, cudaStream_t);
};

#define LAUNCH(kernel)                                                                \
  [](dim3 grid, dim3 block, unsigned shared, void** arguments, cudaStream_t stream) { \
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);          \
  }
CompiledKernel kernels[] = {
    {"paramstats_summarize_chunks", LAUNCH(paramstats_summarize_chunks)},
    {"paramstats_update_chunks", LAUNCH(paramstats_update_chunks)},
    {"paramstats_merge_chunks", LAUNCH(paramstats_merge_chunks)},
    {"paramstats_distribution_chunks", LAUNCH(paramstats_distribution_chunks)},
    {"paramstats_merge_distributions", LAUNCH(paramstats_merge_distributions)}};

// A kernel in the context of a device.
struct LoadedFunction {
  CompiledKernel* kernel;
  int device;
};
std::deque<LoadedFunction> functions;  // a handle is the address of one

constexpr int kHandle = 10;  // the handle of device 0; not its ordinal, for which it may be taken
constexpr Result kInvalidImage = 200, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500;

int retained, modules;
thread_local std::vector<int> below;  // the devices that were current before each push

// Runs `body` unless fail_next was called. The functions that call it with kInContext fail without
// a current context.
enum Need { kNoContext, kInContext };
template <class Body>
Result call(Need need, Body&& body) {
  if (const Result result = cuda_shim::succeed(); result != kSuccess) return result;
  if (need == kInContext && below.empty()) return kInvalidContext;
  return body();
}

}  // namespace

int cuda_shim::retained_contexts() { return retained; }
int cuda_shim::loaded_modules() { return modules; }

extern "C" {

Result cuGetErrorName(Result error, const char** name) {
  *name = cudaGetErrorString(static_cast<cudaError_t>(error));
  return kSuccess;
}

Result cuGetErrorString(Result, const char** text) {
  *text = "an error of the shim";
  return kSuccess;
}

Result cuDeviceGet(int* device, int ordinal) {
  return call(kNoContext, [&]() -> Result {
    if (ordinal < 0 || ordinal >= cuda_shim::kDevices) return cudaErrorInvalidDevice;
    *device = kHandle + ordinal;
    return kSuccess;
  });
}

Result cuDevicePrimaryCtxRetain(Context* context, int device) {
  return call(kNoContext, [&]() -> Result {
    if (device < kHandle) return cudaErrorInvalidDevice;
    ++retained;
    *context = reinterpret_cast<Context>(static_cast<size_t>(device));
    return kSuccess;
  });
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
  if (device < kHandle || retained == 0) return kInvalidContext;
  --retained;
  return kSuccess;
}

Result cuCtxPushCurrent_v2(Context context) {
  return call(kNoContext, [&]() -> Result {
    const int device = static_cast<int>(reinterpret_cast<size_t>(context)) - kHandle;
    if (device < 0) return kInvalidContext;
    below.push_back(cuda_shim::exchange_device(device));
    return kSuccess;
  });
}

Result cuCtxPopCurrent_v2(Context*) {
  if (below.empty()) return kInvalidContext;
  cuda_shim::exchange_device(below.back());
  below.pop_back();
  return kSuccess;
}

Result cuModuleLoadData(Module* module, const void* image) {
  return call(kInContext, [&] {
    if (image != nullptr && *static_cast<const char*>(image) == 0) return kInvalidImage;
    ++modules;
    *module = reinterpret_cast<Module>(&modules);
    return kSuccess;
  });
}

Result cuModuleUnload(Module) {
  --modules;
  return kSuccess;
}

Result cuModuleGetFunction(Function* function, Module, const char* name) {
  return call(kInContext, [&] {
    for (CompiledKernel& compiled : kernels) {
      if (std::string(name) != compiled.name) continue;
      functions.push_back({&compiled, cuda_shim::exchange_device(0)});
      cuda_shim::exchange_device(functions.back().device);
      *function = reinterpret_cast<Function>(&functions.back());
      return kSuccess;
    }
    return kNotFound;
  });
}

// Fails with a function of another device. The arguments are copied.
Result cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                      unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                      Stream stream, void** arguments, void** extra) {
  if (below.empty()) return kInvalidContext;
  const auto* loaded = reinterpret_cast<const LoadedFunction*>(function);
  const int device = cuda_shim::exchange_device(loaded->device);
  cuda_shim::exchange_device(device);
  if (device != loaded->device || extra != nullptr) return kInvalidHandle;
  return loaded->kernel->launch({grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared,
                                arguments, reinterpret_cast<cudaStream_t>(stream));
}

Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, Stream stream) {
  if (below.empty()) return kInvalidContext;
  return cudaMemcpyAsync(reinterpret_cast<void*>(to), from, bytes, cudaMemcpyHostToDevice,
                         reinterpret_cast<cudaStream_t>(stream));
}

Result cuMemsetD8Async(DevicePointer to, unsigned char value, size_t bytes, Stream stream) {
  if (below.empty()) return kInvalidContext;
  return cudaMemsetAsync(reinterpret_cast<void*>(to), value, bytes,
                         reinterpret_cast<cudaStream_t>(stream));
}

Result cuMemHostGetDevicePointer_v2(DevicePointer* device, void* host, unsigned) {
  return call(kInContext, [&] {
    *device = reinterpret_cast<DevicePointer>(cuda_shim::device_pointer(host));
    return kSuccess;
  });
}

Result cuThreadExchangeStreamCaptureMode(int* mode) {
  auto exchanged = static_cast<cudaStreamCaptureMode>(*mode);
  const Result result = cudaThreadExchangeStreamCaptureMode(&exchanged);
  *mode = exchanged;
  return result;
}

}  // extern "C"
