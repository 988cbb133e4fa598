// Which tensors the kernels may read, and where their elements lie.
#pragma once

#include <c10/core/TensorImpl.h>

#include <optional>

#include "cpu/engine.h"
#include "cuda/engine.h"

namespace paramstats {

// Whether a tensor is its own memory, with sizes that are numbers: on that device, or on either.
bool is_plain_cpu(const c10::TensorImpl& t);
bool is_plain_cuda(const c10::TensorImpl& t);
inline bool is_plain(const c10::TensorImpl& t) { return is_plain_cpu(t) || is_plain_cuda(t); }

// A plain tensor's elements, on whatever device; nullopt where the kernels do not know the type, or
// the storage does not hold all elements. The view shows the tensor's own sizes and strides.
std::optional<cpu::TensorView> native_view(const c10::TensorImpl& t);

// The same for the CUDA kernels, which read no gaps and no odd addresses.
std::optional<cuda::TensorView> native_cuda_view(const c10::TensorImpl& t);

}  // namespace paramstats
