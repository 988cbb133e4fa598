// The driver library of the fake device: the one of tests/cpp/cuda_shim, with a log of the launches
// and the error of a device assertion. The library is linked under the name libcuda.so.1, so that
// dlopen() of that name finds it once it is loaded.
#define cuGetErrorString shim_get_error_string
#define cuModuleGetFunction shim_get_function
#define cuLaunchKernel shim_launch_kernel
#define cuMemcpyHtoDAsync_v2 shim_copy_to_device
#include "../cpp/cuda_shim/libcuda.cpp"
#undef cuGetErrorString
#undef cuModuleGetFunction
#undef cuLaunchKernel
#undef cuMemcpyHtoDAsync_v2

#include <map>

#include "fake_device.h"

namespace {

constexpr Result kAssert = 710;  // CUDA_ERROR_ASSERT

std::map<Function, std::string> names;

}  // namespace

namespace fake_device {

void run_all() { cuda_shim::run_all(); }

void* new_stream(int device) {
  const int before = cuda_shim::exchange_device(device);
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  cuda_shim::exchange_device(before);
  return stream;
}

void set_capturing(void* stream, bool capturing) {
  cuda_shim::set_capturing(static_cast<cudaStream_t>(stream), capturing);
}

}  // namespace fake_device

extern "C" {

Result cuGetErrorString(Result error, const char** text) {
  const Result result = shim_get_error_string(error, text);
  if (error == kAssert) *text = "device-side assert triggered";
  return result;
}

Result cuModuleGetFunction(Function* function, Module module, const char* name) {
  const Result result = shim_get_function(function, module, name);
  names[*function] = name;
  return result;
}

Result cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                      unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                      Stream stream, void** arguments, void** extra) {
  if (fake_device::state().failed) return kAssert;
  fake_device::add_work(fake_device::current());
  fake_device::log("cuda_driver", "cuLaunchKernel", "kernel", names[function]);
  return shim_launch_kernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared,
                            stream, arguments, extra);
}

// torch's profiler shows a copy of the driver's interface only as work on the device.
Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, Stream stream) {
  if (fake_device::state().failed) return kAssert;
  fake_device::log("", "", "gpu_memcpy", "Memcpy HtoD (Pinned -> Device)");
  return shim_copy_to_device(to, from, bytes, stream);
}

}  // extern "C"
