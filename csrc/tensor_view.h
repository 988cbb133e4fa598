// Decides which tensors the kernels can read, and describes the memory of these tensors.
#pragma once

#include <c10/core/TensorImpl.h>

#include <optional>

#include "cpu/engine.h"
#include "cuda/engine.h"

namespace paramstats {

// Whether a tensor is a plain strided tensor with concrete sizes: on the CPU, on CUDA, or on
// either. Its memory then holds its elements as they are.
bool is_plain_cpu(const c10::TensorImpl& t);
bool is_plain_cuda(const c10::TensorImpl& t);
inline bool is_plain(const c10::TensorImpl& t) { return is_plain_cpu(t) || is_plain_cuda(t); }

// The memory of a plain tensor on any device. Returns nullopt if the kernels do not support the
// dtype, or if the storage is too small for all elements. The view borrows the tensor's sizes and
// strides.
std::optional<cpu::TensorView> native_view(const c10::TensorImpl& t);

// The memory of a plain tensor for the CUDA kernels. Returns nullopt also if the tensor has gaps or
// is not aligned to its elements.
std::optional<cuda::TensorView> native_cuda_view(const c10::TensorImpl& t);

}  // namespace paramstats
