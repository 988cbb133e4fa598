// One call of the CUDA backend on the CPU implementation of CUDA in cuda_shim.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/engine.h"
#include "tensor.h"

namespace paramstats::test {

// A buffer of an exact size, so that any access beyond it is an error. It contains garbage.
struct DeviceMemory {
  std::unique_ptr<unsigned char[]> bytes;
  explicit DeviceMemory(int64_t size) : bytes(new unsigned char[size]) {
    std::memset(bytes.get(), 0xa5, size);
  }
};
struct PinnedMemory {
  void* bytes;
  explicit PinnedMemory(int64_t size) : bytes(cuda_shim::host_alloc(size)) {
    std::memset(bytes, 0xa5, size);
  }
  ~PinnedMemory() { cuda_shim::host_free(bytes); }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
};

using Views = std::vector<cuda::TensorView>;
using Updates = std::vector<cuda::UpdateView>;

inline cuda::Inputs inputs_of(const Views& views, const Updates& updates) {
  return {views.data(), static_cast<int64_t>(views.size()), updates.data(),
          static_cast<int64_t>(updates.size())};
}

// An enqueued call. The views are overwritten before anything runs.
struct Call {
  cuda::Sizes sizes;
  PinnedMemory host;
  DeviceMemory device;
  std::string error;

  explicit Call(Views views, int ordinal = 0, cudaStream_t stream = nullptr, Updates updates = {})
      : sizes(cuda::sizes(inputs_of(views, updates))), host(sizes.host), device(sizes.device) {
    error = cuda::enqueue(ordinal, inputs_of(views, updates), host.bytes, device.bytes.get(),
                          reinterpret_cast<cuda::Stream>(stream));
    overwrite(views);
    overwrite(updates);
  }

  template <class T>
  static void overwrite(std::vector<T>& all) {
    if (!all.empty()) std::memset(static_cast<void*>(all.data()), 0xa5, all.size() * sizeof(T));
  }

  Moments state(int64_t t = 0) const { return static_cast<const Moments*>(host.bytes)[t]; }
};

inline cuda::TensorView view_of(const Tensor& t) { return {t.data(), t.numel(), t.dtype}; }

// The view of a contiguous tensor of the given number of rows.
inline cuda::TensorView view_of_rows(const Tensor& t, int64_t rows, uint8_t details = 0) {
  return {t.data(), t.numel(), t.dtype, details, rows, t.numel() / rows};
}

// The results of a call: the states of the tensors, then the rows that each update has.
inline std::vector<Moments> run(const Views& views, const Updates& updates = {}) {
  size_t rows = views.size();
  for (const cuda::UpdateView& u : updates) {
    for (int k = 0; k < kUpdateRows; ++k) rows += u.has(static_cast<UpdateRow>(k));
  }
  const Call call(views, 0, nullptr, updates);
  CHECK(call.error, std::string());
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  std::vector<Moments> states;
  for (size_t t = 0; t < rows; ++t) states.push_back(call.state(static_cast<int64_t>(t)));
  return states;
}

// The states of tensors; those without elements are not read on the device.
inline std::vector<Moments> cuda_states(const Tensors& tensors) {
  std::vector<cuda::TensorView> views;
  for (const Tensor& t : tensors) {
    if (t.numel() > 0) views.push_back(view_of(t));
  }
  const std::vector<Moments> found = views.empty() ? std::vector<Moments>() : run(views);
  std::vector<Moments> states;
  size_t next = 0;
  for (const Tensor& t : tensors) states.push_back(t.numel() > 0 ? found[next++] : Moments());
  return states;
}

// What a call enqueues.
struct Counts {
  int64_t launches = cuda_shim::launches(), copies = cuda_shim::copies();
  void check(int64_t more_launches, int64_t more_copies) const {
    CHECK(cuda_shim::launches() - launches, more_launches);
    CHECK(cuda_shim::copies() - copies, more_copies);
  }
};

void run_merge_tests();   // test_cuda_merge.cpp
void run_engine_tests();  // test_cuda_engine.cpp
void run_update_tests();  // test_cuda_updates.cpp
void run_detail_tests();  // test_cuda_details.cpp

}  // namespace paramstats::test
