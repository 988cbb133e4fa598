// The interface of the CUDA backend: raw pointers and a stream, without torch, Python or headers of
// CUDA. No function waits for the device. Errors are texts; "" is success.
#pragma once

#include <string>

#include "driver.h"
#include "table.h"

namespace paramstats::cuda {

// The memory that a call needs, in bytes: pinned memory on the host, whose first n Moments become
// the results, and memory on the device, which may be none.
struct Sizes {
  int64_t host, device;
};

// Loads the kernels, compiled as a cubin, on a device. A second image replaces the first, unless it
// does not load. driver must be open.
std::string load(int device, const void* image);

// The memory that enqueue needs for n > 0 tensors. Every tensor must have an element.
Sizes sizes(const TensorView* tensors, int64_t n);

// Enqueues on `stream` the reading of n > 0 tensors of a device. Their states are written to the
// first n Moments of `host`, which must be pinned. The tensors, `host` and `device_memory` must
// stay valid until the stream is done, also after an error. May block while the queue of the device
// is full.
std::string enqueue(int device, const TensorView* tensors, int64_t n, void* host,
                    void* device_memory, Stream stream);

// Sets the capture mode of this thread (a CUstreamCaptureMode) and returns the previous one.
int exchange_capture_mode(int mode);

constexpr int kRelaxedCapture = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED: allows event queries

}  // namespace paramstats::cuda
