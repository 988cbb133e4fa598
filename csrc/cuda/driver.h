// The functions of CUDA's driver library (libcuda) that the engine calls. They are found at run
// time: neither the build nor the import of this module needs CUDA.
#pragma once

#include <cstddef>
#include <string>

// Incomplete types of the driver's interface; the header cuda.h may be missing.
struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;

namespace paramstats::cuda {

using Result = int;  // CUresult
constexpr Result kSuccess = 0;
using DevicePointer = unsigned long long;
using Context = CUctx_st*;
using Module = CUmod_st*;
using Function = CUfunc_st*;
using Stream = CUstream_st*;

// X(symbol, arguments). cuModule* loads a cubin on one device. cuLibrary* would load it on all, if
// CUDA_MODULE_LOADING is EAGER, and fail if there is another kind of GPU.
#define PARAMSTATS_DRIVER(X)                                                                       \
  X(cuGetErrorName, (Result, const char**))                                                        \
  X(cuGetErrorString, (Result, const char**))                                                      \
  X(cuDeviceGet, (int* device, int ordinal))                                                       \
  X(cuDevicePrimaryCtxRetain, (Context*, int device))                                              \
  X(cuDevicePrimaryCtxRelease_v2, (int device))                                                    \
  X(cuCtxPushCurrent_v2, (Context))                                                                \
  X(cuCtxPopCurrent_v2, (Context*))                                                                \
  X(cuModuleLoadData, (Module*, const void* image))                                                \
  X(cuModuleUnload, (Module))                                                                      \
  X(cuModuleGetFunction, (Function*, Module, const char* name))                                    \
  X(cuLaunchKernel,                                                                                \
    (Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,                \
     unsigned block_y, unsigned block_z, unsigned shared, Stream, void** arguments, void** extra)) \
  X(cuMemcpyHtoDAsync_v2, (DevicePointer, const void*, size_t bytes, Stream))                      \
  X(cuMemsetD8Async, (DevicePointer, unsigned char, size_t bytes, Stream))                         \
  X(cuMemHostGetDevicePointer_v2, (DevicePointer*, void* host, unsigned flags))                    \
  X(cuThreadExchangeStreamCaptureMode, (int* mode))

struct Driver {
#define PARAMSTATS_FIELD(name, arguments) Result(*name) arguments = nullptr;
  PARAMSTATS_DRIVER(PARAMSTATS_FIELD)
#undef PARAMSTATS_FIELD
};
extern Driver driver;

// Finds the functions in a library, e.g. "libcuda.so.1". Returns why that failed, or "".
std::string open_driver(const char* path);

// The text of an error of a driver function, e.g. "cuModuleGetFunction: CUDA_ERROR_NOT_FOUND: named
// symbol not found"; "" for kSuccess.
std::string text_of(const char* function, Result);

}  // namespace paramstats::cuda
