// Describes the memory of the tensors that the kernels can read.
#pragma once

#include <optional>

#include "cpu/engine.h"
#include "cuda/engine.h"
#include "torch_abi.h"

namespace paramstats {

// The dtype of a tensor; nullopt if the kernels do not support it.
std::optional<DType> dtype_of(torch_abi::Impl t);

// The memory of a plain tensor on any device. Returns nullopt if the kernels do not support the
// dtype, or if the storage is too small for all elements. The view borrows the tensor's sizes and
// strides.
std::optional<cpu::TensorView> native_view(torch_abi::Impl t);

// The memory of a plain tensor for the CUDA kernels. Returns nullopt also if the tensor has gaps or
// is not aligned to its elements.
std::optional<cuda::TensorView> native_cuda_view(torch_abi::Impl t);

}  // namespace paramstats
