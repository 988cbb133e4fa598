// The interface of the CUDA backend: raw pointers and a stream, without torch, Python or headers of
// CUDA. No function waits for the device. Errors are texts; "" is success.
#pragma once

#include <string>
#include <vector>

#include "driver.h"
#include "table.h"

namespace paramstats::cuda {

// What a call reads on one device. Every tensor and update must have an element. The results are
// the states of the tensors, then the rows of each update, without those that it does not have.
struct Inputs {
  const TensorView* tensors;
  int64_t n;
  const UpdateView* updates = nullptr;
  int64_t n_updates = 0;
};

// The memory that a call needs, in bytes: pinned memory on the host, which begins with the results,
// and memory on the device, which may be none.
struct Sizes {
  int64_t host, device;
};

// Loads the kernels, compiled as a cubin, on a device. A second image replaces the first, unless it
// does not load. driver must be open.
std::string load(int device, const void* image);

// The memory that enqueue needs. There must be a tensor or a row of an update.
Sizes sizes(const Inputs& inputs);

// Enqueues on `stream` the reading of tensors and updates of a device. Their results are written to
// the begin of `host`, which must be pinned. The tensors, `host` and `device_memory` must stay
// valid until the stream is done, also after an error. May block while the queue of the device is
// full.
std::string enqueue(int device, const Inputs& inputs, void* host, void* device_memory,
                    Stream stream);

// What was read of a tensor besides its state, in the packed format of
// paramstats/_core/details.py; "" where it was not asked for or, of zero rows, if there are none.
struct Details {
  int64_t tensor;  // index
  std::string distribution, zero_rows;
};

// The details that a finished enqueue has written to `host`, of the tensors that have any. The
// memory of the tensors is not accessed.
std::vector<Details> details(const Inputs& inputs, const void* host);

// Sets the capture mode of this thread (a CUstreamCaptureMode) and returns the previous one.
int exchange_capture_mode(int mode);

constexpr int kRelaxedCapture = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED: allows event queries

}  // namespace paramstats::cuda
