// The functions of libcuda that csrc/cuda/driver.h names, on top of the shim. The kernels are those
// of csrc/cuda/kernels.h, compiled for the CPU: a loaded image is not looked at, but an empty one
// is refused.
#include "../../../csrc/cuda/driver.h"

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "../../../csrc/cuda/kernels.h"

namespace {

using namespace paramstats::cuda;  // NOLINT: the types of the driver

// A kernel, and how to launch it.
struct Entry {
  const char* name;
  cudaError_t (*launch)(unsigned grid, unsigned block, void** arguments, cudaStream_t stream);
};

#define LAUNCH(kernel)                                                              \
  [](unsigned grid, unsigned block, void** arguments, cudaStream_t stream) {        \
    return cudaLaunchKernel(kernel, dim3(grid), dim3(block), arguments, 0, stream); \
  }
Entry entries[] = {{"paramstats_summarize_chunks", LAUNCH(paramstats_summarize_chunks)},
                   {"paramstats_merge_chunks", LAUNCH(paramstats_merge_chunks)}};

constexpr Result kInvalidContext = 201, kNotFound = 500;

thread_local std::vector<int> contexts;  // the devices of the contexts below the current one

cudaStream_t runtime(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace

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
  *device = ordinal;
  return cuda_shim::succeed();
}

Result cuDevicePrimaryCtxRetain(Context* context, int device) {
  *context = reinterpret_cast<Context>(static_cast<size_t>(device) + 1);
  return cuda_shim::succeed();
}

Result cuCtxPushCurrent_v2(Context context) {
  int device;
  if (const Result result = cudaGetDevice(&device); result != kSuccess) return result;
  const Result result = cudaSetDevice(static_cast<int>(reinterpret_cast<size_t>(context)) - 1);
  if (result == kSuccess) contexts.push_back(device);
  return result;
}

Result cuCtxPopCurrent_v2(Context*) {
  if (contexts.empty()) return kInvalidContext;
  cudaSetDevice(contexts.back());
  contexts.pop_back();
  return kSuccess;
}

Result cuLibraryLoadData(Library*, const void* image, int*, void**, unsigned, int*, void**,
                         unsigned) {
  const auto* bytes = static_cast<const char*>(image);
  return bytes != nullptr && *bytes == 0 ? cudaErrorInvalidPtx : cuda_shim::succeed();
}

Result cuLibraryGetKernel(Kernel* kernel, Library, const char* name) {
  for (Entry& entry : entries) {
    if (std::string(name) == entry.name) {
      *kernel = reinterpret_cast<Kernel>(&entry);
      return cuda_shim::succeed();
    }
  }
  return kNotFound;
}

Result cuKernelGetFunction(Function* function, Kernel kernel) {
  *function = reinterpret_cast<Function>(kernel);
  return cuda_shim::succeed();
}

Result cuLaunchKernel(Function function, unsigned grid, unsigned, unsigned, unsigned block,
                      unsigned, unsigned, unsigned, Stream stream, void** arguments, void**) {
  return reinterpret_cast<Entry*>(function)->launch(grid, block, arguments, runtime(stream));
}

Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, Stream stream) {
  return cudaMemcpyAsync(reinterpret_cast<void*>(to), from, bytes, cudaMemcpyHostToDevice,
                         runtime(stream));
}

Result cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, reinterpret_cast<void*>(from), bytes, cudaMemcpyDeviceToHost,
                         runtime(stream));
}

Result cuThreadExchangeStreamCaptureMode(int* mode) {
  auto exchanged = static_cast<cudaStreamCaptureMode>(*mode);
  const Result result = cudaThreadExchangeStreamCaptureMode(&exchanged);
  *mode = exchanged;
  return result;
}

}  // extern "C"
