// The CUDA tensors of one call that the kernels read on one device.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/engine.h"
#include "torch_abi.h"

namespace paramstats {

// Between the walk and the launch, other threads may run. They may drop a gradient or replace the
// data of a tensor, and torch may give the memory to others. A group therefore holds what it reads
// in one of two ways:
//
// - It refers to the list of tensors, to each gradient and to the operands of updates, as torch's
//   own operators do. `enqueue` compares the memory of each tensor before and after the launch, and
//   reports a difference: then the call must be repeated.
// - With `hold`, it has aliases, which also keep the storages alive. To make one takes about 200
// ns.
class CudaGroup {
 public:
  CudaGroup(int32_t device, pybind11::list tensors, bool hold);
  CudaGroup(CudaGroup&&) = default;
  CudaGroup& operator=(CudaGroup&&) = default;

  int32_t device() const { return device_; }

  // Adds a row of the table: of tensor `row`, or of the gradient of tensor `row - N` of N.
  void add(torch_abi::Impl, const cuda::TensorView&, size_t row);

  // Adds an update, after all tensors. `operands` are all tensors that it reads. Its rows begin
  // with `row` of the table.
  using Operands = std::vector<std::pair<torch_abi::Impl, cuda::TensorView>>;
  void add(const cuda::UpdateView&, const Operands& operands, size_t row);

  cuda::Sizes sizes() const;

  // Enqueues the reads (cuda::enqueue) without the GIL. Returns an error, or "". Sets `replaced` if
  // another thread has replaced a tensor: then the results may be wrong.
  std::string enqueue(uintptr_t host, uintptr_t device_memory, uintptr_t stream);
  bool replaced() const { return replaced_; }

  // Copies the results, which a finished `enqueue` has written to `host`, to their rows of a table.
  void write(const pybind11::bytearray& table, uintptr_t host) const;

  // What a finished `enqueue` has read in addition to the states: {row of the table: (distribution,
  // None, zero rows)}, each bytes or None.
  pybind11::dict details(uintptr_t host) const;

  // The tensors as Python objects: aliases. May run Python code. If another thread has replaced a
  // tensor, there are none, and `enqueue` will only report it.
  pybind11::list aliases();

 private:
  cuda::Inputs inputs() const;
  bool is_unchanged(bool fully) const;

  int32_t device_;
  pybind11::list tensors_;
  bool hold_;
  bool replaced_ = false;
  std::vector<cuda::TensorView> views_;
  std::vector<cuda::UpdateView> updates_;
  std::vector<int64_t> rows_;  // of the views, then those of the updates
  std::vector<torch_abi::Owned> held_;
  std::vector<std::pair<torch_abi::Owned, cuda::TensorView>> operands_;  // of the updates
};

}  // namespace paramstats
