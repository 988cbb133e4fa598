// Reads tensors into a table: a bytes object of 2 N Moments for N tensors, first the states of the
// tensors, then those of their gradients (count == kAbsent if there is no gradient).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/engine.h"
#include "torch_abi.h"

namespace paramstats {

// The tensors of one call that are on one CUDA device. paramstats/_core/cuda.py starts the read.
struct CudaGroup {
  explicit CudaGroup(int32_t device_index) : device(device_index) {}
  CudaGroup(CudaGroup&&) = default;
  CudaGroup& operator=(CudaGroup&&) = default;

  int32_t device;
  std::vector<cuda::TensorView> views;
  std::vector<int64_t> rows;
  std::vector<torch_abi::Owned> tensors;  // aliases, which keep the memory of the views alive
};

// Returns (table, deferred rows, groups of CUDA tensors); see _native.pyi. Rows of CUDA tensors are
// unread at first: paramstats/_core/cuda.py fills them in.
pybind11::tuple read(const pybind11::list& tensors, bool params, bool grads, bool cuda);

// The names of the SIMD levels that this CPU supports, fastest first, and the one in use.
std::vector<std::string> simd_levels();
std::string simd_level();
void set_simd_level(const std::string& name);

}  // namespace paramstats
