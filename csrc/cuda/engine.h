// The interface of the CUDA backend: raw pointers and a stream, without torch, Python or CUDA
// headers.
//
// The backend is built as a separate module, paramstats._cuda (csrc/cuda_binding.cpp), so that a
// missing CUDA library does not prevent the CPU backend from loading.
#pragma once

#include "../dtypes.h"
#include "../moments.h"

namespace paramstats::cuda {

constexpr int kChunkBytes = 1 << 17;  // bytes of a tensor that one thread block reads

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

// The memory that a call needs: pinned memory on the host, whose first n Moments become the
// results, and memory on the device.
struct Sizes {
  int64_t host, device;  // bytes
};

// None of these functions waits for the device. Errors are messages (static strings); null is
// success.

// Returns an error if the kernels cannot run on the current device, e.g. because they were not
// compiled for its architecture.
const char* check();

Sizes sizes(const TensorView* tensors, int64_t n);

// Enqueues on `stream` (a cudaStream_t): read n > 0 tensors of the current device and write their
// states to the first n Moments of `host`. The tensors, `host` and `device` must stay valid until
// the stream is done.
const char* enqueue(const TensorView* tensors, int64_t n, void* host, void* device, void* stream);

// Sets the capture mode of this thread (a cudaStreamCaptureMode as an int) and returns the previous
// one.
int exchange_capture_mode(int mode);

constexpr int kRelaxedCapture = 2;  // cudaStreamCaptureModeRelaxed: allows event queries

#endif

}  // namespace paramstats::cuda
