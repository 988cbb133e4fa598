// Passes the CUDA tensors of one call to the CUDA backend, with torch's own streams, allocators and
// events. It uses them through c10, so it compiles and loads without CUDA.
#pragma once

#include <c10/core/Stream.h>
#include <c10/core/TensorImpl.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/engine.h"
#include "moments.h"

namespace paramstats {

// Sets the CUDA backend: the capsule that paramstats._cuda.api() returns. Raises ValueError if its
// version differs from the one this was built for.
void use_cuda_backend(const pybind11::capsule& api);

// Why the CUDA backend cannot run on a device, e.g. because it was not compiled for its
// architecture;
// "" if it can run.
const std::string& cuda_error(c10::DeviceIndex device);

// The states of one device's tensors, which may still be being computed.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual bool ready() const = 0;
  // Waits for this transfer alone and writes its states to their rows of a table of `rows` rows.
  virtual void write(Moments* table, size_t rows) const = 0;
};

// The CUDA tensors of one call. `add` reads no memory; `start` enqueues the reads on the devices.
class CudaCall {
 public:
  // Returns false if there is no CUDA backend for the tensor's device. Raises std::runtime_error if
  // the device's current stream is being captured into a CUDA graph; the capture stays valid.
  bool add(const cuda::TensorView& view, const c10::TensorImpl& tensor, size_t row);

  bool empty() const { return groups_.empty(); }

  // Enqueues the reads on each device's current stream and does not wait. Releases the GIL: a
  // launch may block on a full queue until other Python code has run.
  //
  // Memory: the results, the table and the workspace come from torch's allocators, which reuse
  // freed memory in stream order. This also makes it safe to free the tensors at once, if they were
  // allocated on the stream that reads them (torch's operators have the same rule). If that stream
  // is not the default stream, on which the model was most likely allocated, the tensors' storages
  // are recorded on it.
  std::vector<std::shared_ptr<Transfer>> start();

 private:
  struct Group {
    c10::Stream stream;
    void* handle;    // its cudaStream_t
    bool supported;  // whether the CUDA backend runs on this device
    std::vector<cuda::TensorView> views;
    std::vector<c10::Storage> storages;  // kept alive until the reads are enqueued
    std::vector<size_t> rows;
  };
  Group& group_of(const c10::Device& device);
  static std::shared_ptr<Transfer> start(Group& group);
  std::vector<Group> groups_;
};

}  // namespace paramstats
