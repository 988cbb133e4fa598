// The CPU backend: computes one Moments per tensor and reads the memory once.
//
// It works on raw pointers and needs neither torch nor Python. It has no threads; the caller passes
// a thread pool.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "../dtypes.h"
#include "../moments.h"
#include "kernels.h"

namespace paramstats::cpu {

struct Details;  // details.h

// A strided tensor. `sizes` and `strides` (in elements) are borrowed for the duration of a call.
// `ndim` may be 0 for any contiguous tensor.
struct TensorView {
  const void* data;
  DType dtype;
  int64_t numel;
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t rows = 0;            // the size of dimension 0; 0 without dimensions
  Details* details = nullptr;  // to read, too
};

constexpr size_t kNoTensor = SIZE_MAX;

// An update: its operands have `numel` elements each. `tensors` are the positions in the call's
// list of tensors that have the memory of operands, or kNoTensor.
struct Update {
  UpdateOperands operands;
  int64_t numel;
  std::array<size_t, 4> tensors;
  Moments* rows;  // kUpdateRows of them
};

// A pool calls task(i, context) once for every i in [0, n), in any order and on any threads, and
// returns after the last call has returned. Tasks do not throw.
using Task = void (*)(int64_t i, void* context);
using Pool = void (*)(int64_t n, Task task, void* context);

// A call that reads fewer bytes runs on the calling thread: waking others would take longer.
constexpr int64_t kSerialBytes = 1 << 20;

// The tensors that have zero rows and others, and a bit for each row: whether all its elements are
// zero. No bytes for a tensor with too many rows (kMostRows), of which they are not known.
using ZeroRows = std::vector<std::pair<size_t, std::vector<uint8_t>>>;

// Writes the state of tensors[i] to *out[i], its details, and the rows of each update; rows whose
// operands are missing are absent. A chunk of an update is computed right before those of its
// tensors are read, which are then in the cache. The result is bitwise the same for any pool, and
// does not depend on the other tensors of the call. Throws nothing but std::bad_alloc, and only
// before it reads any element, or when it is done. Does not use sizes and strides after it has
// called the pool. Adds the tensors with zero rows to `zero_rows`.
void summarize(const std::vector<TensorView>& tensors, const std::vector<Moments*>& out,
               const Kernels& kernels, Pool pool, const std::vector<Update>& updates = {},
               ZeroRows* zero_rows = nullptr);

// The kernels of each SIMD level that this CPU supports, fastest first. Never empty.
const std::vector<const Kernels*>& available_kernels();

}  // namespace paramstats::cpu
