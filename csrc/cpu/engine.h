// The CPU engine: many tensors in, one Moments each out, one read of memory.
//
// It knows raw pointers only: no torch, no Python, and no threads of its own (the caller hands it a
// thread pool).
#pragma once

#include <cstdint>
#include <vector>

#include "../dtypes.h"
#include "../moments.h"
#include "kernels.h"

namespace paramstats::cpu {

// A strided tensor. `sizes` and `strides` (in elements) are borrowed for the length of a call.
struct TensorView {
  const void* data;
  DType dtype;
  int64_t numel;
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

// Runs task(i, context) once for every i in [0, n), in any order, on any threads; returns when all
// are done. Tasks do not throw.
using Task = void (*)(int64_t i, void* context);
using Pool = void (*)(int64_t n, Task task, void* context);

// Below this many bytes a call is cheaper on the calling thread than woken threads are.
constexpr int64_t kSerialBytes = 1 << 20;

int64_t total_bytes(const std::vector<TensorView>& tensors);

// Writes the state of tensors[i] to *out[i]. Bitwise the same for any pool and any company that a
// tensor is in. Throws std::bad_alloc alone, before anything is read; sizes and strides are not
// looked at any more once the pool runs.
void summarize(const std::vector<TensorView>& tensors, const std::vector<Moments*>& out,
               const Kernels& kernels, Pool pool);

// The kernels of every level that this processor can run, the fastest first. Never empty.
const std::vector<const Kernels*>& available_kernels();

}  // namespace paramstats::cpu
