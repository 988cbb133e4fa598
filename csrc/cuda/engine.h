// The CUDA engine as its callers see it: raw pointers and a stream; no torch, no Python, no CUDA
// header.
//
// It is built into a module of its own, paramstats._cuda, so that a CUDA library that is missing
// never keeps the CPU engine from loading. That module exports `api()`; csrc/accelerator.cpp calls
// through it.
#pragma once

#include "../dtypes.h"
#include "../moments.h"

namespace paramstats::cuda {

constexpr int kChunkBytes = 1 << 17;  // of a tensor, that one thread block reads

// A tensor without gaps.
struct TensorView {
  const void* data;  // aligned to its elements
  int64_t numel;
  DType dtype;
};

PARAMSTATS_HD constexpr int64_t chunk_size(DType dtype) {  // elements
  return kChunkBytes >> log2_size(dtype);
}

PARAMSTATS_HD inline int64_t chunk_count(const TensorView& t) {
  return ((t.numel << log2_size(t.dtype)) + kChunkBytes - 1) / kChunkBytes;
}

#if !defined(__CUDACC_RTC__)

// Memory that a call needs: pinned on the host, whose first n Moments will be the results, and on
// the device.
struct Sizes {
  int64_t host, device;  // bytes
};

// An error is a text that lives as long as the module; null means none. Nothing here waits.
struct Api {
  // What stands in the way of running on the current device at all: no machine code that it
  // understands.
  const char* (*check)();
  // Whether `stream` (a cudaStream_t) is being captured into a graph.
  const char* (*is_capturing)(void* stream, bool& capturing);
  // Sets how careful the runtime is for this thread while somebody captures a graph, and returns
  // how careful it was: cudaStreamCaptureMode as an int.
  int (*exchange_capture_mode)(int mode);
  Sizes (*sizes)(const TensorView* tensors, int64_t n);
  // Has `stream` read n > 0 tensors of the current device into the first n Moments of `host`. The
  // tensors, `host` and `device` belong to the stream until it gets there.
  const char* (*enqueue)(const TensorView* tensors, int64_t n, void* host, void* device,
                         void* stream);
};

const Api& api();

constexpr int kRelaxedCapture = 2;  // cudaStreamCaptureModeRelaxed: events may be asked after

constexpr const char* kApiName = "paramstats.cuda.Api/1";  // of the capsule; counts its changes

#endif

}  // namespace paramstats::cuda
