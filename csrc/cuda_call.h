// A call's CUDA tensors: handed to the CUDA engine by way of torch's own streams, allocators and
// events, which c10 offers without CUDA. So this compiles and loads where CUDA is not.
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

// Makes the functions of paramstats._cuda the CUDA engine: what its `api()` returned.
void use_cuda_engine(const pybind11::capsule& api);

// Why the CUDA engine cannot run on a device ("" where it can): its machine code does not fit, say.
const std::string& cuda_trouble(c10::DeviceIndex device);

// States on their way from one device.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual bool ready() const = 0;
  // Waits for this transfer alone and puts its states into their rows of a table.
  virtual void write(Moments* table, size_t rows) const = 0;
};

// The tensors of one call. Adding reads no memory; they are read when their device gets to it.
class CudaCall {
 public:
  // False where there is no CUDA engine for the tensor's device. Raises std::runtime_error where
  // the device's current stream is being captured into a CUDA graph; nothing has touched it then.
  bool add(const cuda::TensorView& view, const c10::TensorImpl& tensor, size_t row);

  bool empty() const { return groups_.empty(); }

  // Has each device's current stream read its tensors; does not wait. The GIL is let go meanwhile:
  // a launch may have to wait for room in a queue that Python code is to empty.
  //
  // Memory: the results, the table and the workspace are of torch's allocators, which reuse what is
  // let go in the order of the stream. So are the tensors themselves, if they were allocated on the
  // stream that reads them, as torch's operators demand, too; where that stream is not the device's
  // default one, which the model was most likely made on, their storages are told of it.
  std::vector<std::shared_ptr<Transfer>> start();

 private:
  struct Group {
    c10::Stream stream;
    void* handle;  // its cudaStream_t
    bool runs;     // the CUDA engine does, on this device
    std::vector<cuda::TensorView> views;
    std::vector<c10::Storage> storages;  // alive until their reading is enqueued
    std::vector<size_t> rows;
  };
  Group& group_of(const c10::Device& device);
  static std::shared_ptr<Transfer> start(Group& group);
  std::vector<Group> groups_;
};

}  // namespace paramstats
