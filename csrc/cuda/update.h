// Summarizes one chunk of an update with the threads of a block. A part of kernels.h.
//
// A block reads the operands of its chunk once, four elements of each at a time where their
// addresses allow it. dw is computed in float32. It is summed around a pivot in float64, as are the
// products. The pivot is dw of the first element, so that sum(d)^2 / n <= (1 - 1 / n) sum(d^2): the
// subtraction of the two loses at most 14 of 53 bits for the n of a chunk. If an operand is float64
// or a sum is not finite, the chunk is read again, element by element in float64 and once per row.
#pragma once

#include "access.h"
#include "chunk.h"
#include "table.h"

namespace paramstats::cuda {

// What the threads of a block share.
struct UpdateChunk {
  Array operands[kOperands];      // from the first element of the chunk on
  Moments* targets[kUpdateRows];  // where the states are written; null if there is no such row
  int n;
  UpdateMethod method;
  Hyperparameters hyperparameters;
  double step;
  StepConstants<float> constants;
};

// Finds the chunk of this block.
__device__ inline void own_chunk(const UpdateTable& arguments, UpdateChunk& chunk) {
  const UpdateEntry* entries = arguments.updates;
  const uint32_t u = find_entry<&UpdateEntry::first_chunk>(entries, arguments.n, blockIdx.x);
  if (threadIdx.x == 0) {
    const UpdateView& view = entries[u].view;
    const int64_t size = chunk_size(view.numel, kUpdateRowDType);
    const int64_t index = blockIdx.x - entries[u].first_chunk;
    const int64_t remaining = view.numel - index * size;
    const bool is_only = view.numel <= size;
    uint32_t row = entries[u].first_row;
    for (int k = 0; k < kUpdateRows; ++k) {
      chunk.targets[k] = nullptr;
      if (!view.has(static_cast<UpdateRow>(k))) continue;
      const uint32_t first_state = arguments.entries[row].first_chunk;
      chunk.targets[k] = is_only ? arguments.rows + row : arguments.states + first_state + index;
      if (index == 0 && !is_only) arguments.merged[row] = 0;  // for the next launch
      ++row;
    }
    chunk.method = view.has(kUpdate) ? view.method : UpdateMethod::kNone;
    for (int k = 0; k < kOperands; ++k) {
      const Array whole = view.operands[k];
      const char* data = static_cast<const char*>(whole.data);
      const bool is_needed = k == kOld      ? chunk.method == UpdateMethod::kDifference
                             : k == kWeight ? chunk.method != UpdateMethod::kNone
                                            : data != nullptr;
      data = is_needed ? data + (index * size << log2_size(whole.dtype)) : nullptr;
      chunk.operands[k] = {data, whole.dtype};
    }
    chunk.n = static_cast<int>(remaining < size ? remaining : size);
    chunk.hyperparameters = view.hyperparameters;
    chunk.step = view.step_tensor.data == nullptr
                     ? view.step
                     : element_of(view.step_tensor.dtype, view.step_tensor.data, 0);
    chunk.constants = step_constants<float>(chunk.hyperparameters, chunk.step);
  }
  __syncthreads();
}

// ---- one element -------------------------------------------------------------------------------

// dw of an element, from its operands and the root of its variance.
template <class T>
__device__ inline T change_of(UpdateMethod method, const T (&x)[kOperands], T root,
                              const StepConstants<T>& constants) {
  T change = x[kWeight] - x[kOld];
  if (method != UpdateMethod::kDifference) {
    formula(x[kWeight], x[kMomentum], root, constants, change);
  }
  return change;
}

// Whether an element of the parameter did not change.
template <class T>
__device__ inline bool is_unchanged(UpdateMethod method, DType dtype, T weight, T change) {
  if (method == UpdateMethod::kDifference) return change == 0;
  switch (dtype) {
    case DType::kBFloat16: return is_lost<DType::kBFloat16>(weight, change);
    case DType::kFloat16: return is_lost<DType::kFloat16>(weight, change);
    case DType::kFloat32: return is_lost<DType::kFloat32>(weight, change);
    default: return is_lost<DType::kFloat64>(weight, change);
  }
}

// ---- in float32 --------------------------------------------------------------------------------

// The sums of a thread. Operands that are missing are 0, and what is computed from them is not
// used.
struct UpdateSums {
  Sums<InFloat> change;
  double products[kUpdateRows] = {};  // by row; the first is the number of elements with small v

  __device__ explicit UpdateSums(float first) { change.min = change.max = first; }

  __device__ void take(const UpdateChunk& chunk, const float (&x)[kOperands], double pivot) {
    const double grad = x[kGrad];
    const float root = sqrtf(x[kVariance]);
    if (chunk.method != UpdateMethod::kNone) {
      const float dw = change_of(chunk.method, x, root, chunk.constants);
      const double d = dw - pivot;
      change.sum += d;
      change.sum_sq = fused(d, d, change.sum_sq);
      change.min = smaller(change.min, dw);
      change.max = larger(change.max, dw);
      change.zeros +=
          is_unchanged(chunk.method, chunk.operands[kWeight].dtype, x[kWeight], dw) ? 1.0f : 0.0f;
      products[kUpdateGrad] = fused(double{dw}, grad, products[kUpdateGrad]);
    }
    products[kGradMomentum] = fused(grad, double{x[kMomentum]}, products[kGradMomentum]);
    float lag;
    lag_root(x[kGrad], x[kVariance], root, chunk.constants, lag);
    products[kLag] = fused(double{lag}, double{lag}, products[kLag]);
    products[kUpdate] += x[kVariance] < chunk.constants.least_variance ? 1 : 0;
  }
};

// Four elements of 2 or 4 bytes, in the first words.
__device__ inline Words load_four(const Array& from, int i) {
  if (log2_size(from.dtype) == 1) {
    const auto load = __ldg(static_cast<const unsigned long long*>(from.data) + i);
    return {{static_cast<uint32_t>(load), static_cast<uint32_t>(load >> 32), 0, 0}};
  }
  const uint4 load = __ldg(static_cast<const uint4*>(from.data) + i);
  return {{load.x, load.y, load.z, load.w}};
}

__device__ inline float one_of_four(const Words& v, DType dtype, int i) {
  if (dtype == DType::kFloat32) return as_float(v.w[i]);
  const uint32_t bits = v.w[i / 2] >> (i % 2 * 16) & 0xffffu;
  return dtype == DType::kBFloat16 ? as_float(bits << 16) : half_value(bits);
}

__device__ inline float float_of(const Array& from, int i) {
  switch (from.dtype) {
    case DType::kFloat32: return element<Float32>(static_cast<const uint32_t*>(from.data), i);
    case DType::kBFloat16: return element<BFloat16>(static_cast<const uint16_t*>(from.data), i);
    default: return element<Float16>(static_cast<const uint16_t*>(from.data), i);
  }
}

__device__ inline void load_element(const UpdateChunk& chunk, int i, float (&x)[kOperands]) {
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    x[k] = chunk.operands[k].data != nullptr ? float_of(chunk.operands[k], i) : 0.0f;
  }
}

// Returns false if float32 cannot represent the chunk: a float64 operand, NaN, infinity, overflow
// or underflow.
__device__ inline bool try_update(const UpdateChunk& chunk, Shared<kThreads>& shared) {
  if (!chunk.constants.fit) return false;
  bool in_fours = true;
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    const Array from = chunk.operands[k];
    if (from.data == nullptr) continue;
    if (from.dtype == DType::kFloat64) return false;
    const auto bytes = uint64_t{4} << log2_size(from.dtype);
    if (reinterpret_cast<uint64_t>(from.data) % bytes != 0) in_fours = false;
  }
  const int fours = in_fours ? chunk.n / 4 : 0;

  float x[kOperands];
  load_element(chunk, 0, x);
  const float first = change_of(chunk.method, x, sqrtf(x[kVariance]), chunk.constants);
  const double pivot = first;
  UpdateSums sums(first);
#pragma unroll 1
  for (int i = threadIdx.x; i < fours; i += kThreads) {
    Words v[kOperands];
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      v[k] = {};
      if (chunk.operands[k].data != nullptr) v[k] = load_four(chunk.operands[k], i);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < kOperands; ++k) x[k] = one_of_four(v[k], chunk.operands[k].dtype, j);
      sums.take(chunk, x, pivot);
    }
  }
#pragma unroll 1
  for (int i = 4 * fours + threadIdx.x; i < chunk.n; i += kThreads) {
    load_element(chunk, i, x);
    sums.take(chunk, x, pivot);
  }

  const ShiftedSums s = block_sums(sums.change, shared);
  double (&products)[kUpdateRows] = sums.products;
  block_add(products, shared);
  Moments state;
  if (chunk.targets[kUpdate] != nullptr &&
      from_sums(s, chunk.n, pivot, 1, kMinUpdateSquares, kLargest, state) != Fit::kGood) {
    return false;
  }
#pragma unroll
  for (int row = kUpdate + 1; row < kUpdateRows; ++row) {
    if (chunk.targets[row] != nullptr && !is_finite(products[row])) return false;
  }
  if (products[kLag] > 0 && products[kLag] < kMinUpdateSquares) return false;
  if (threadIdx.x >= 32) return true;
  if (chunk.targets[kUpdate] != nullptr) store(chunk.targets[kUpdate], state);
#pragma unroll
  for (int row = kUpdate + 1; row < kUpdateRows; ++row) {
    if (chunk.targets[row] == nullptr) continue;
    const double sum = row == kLag ? times(products[row], chunk.constants.bc2) : products[row];
    const auto zeros = row == kLag ? static_cast<int64_t>(products[kUpdate]) : 0;
    store(chunk.targets[row], row_of_products(chunk.n, 0, sum, zeros));
  }
  return true;
}

// ---- in float64 --------------------------------------------------------------------------------

__device__ inline double double_of(const Array& from, int i) {
  return from.dtype == DType::kFloat64
             ? element<Float64>(static_cast<const unsigned long long*>(from.data), i)
             : float_of(from, i);
}

// Summarizes this block's chunk element by element. It is not inlined, so that the fast path needs
// no registers for it.
__device__ __noinline__ void exact_update(const UpdateChunk& chunk, Shared<kThreads>& shared) {
  const auto constants = step_constants<double>(chunk.hyperparameters, chunk.step);
#pragma unroll 1
  for (int row = 0; row < kUpdateRows; ++row) {
    if (chunk.targets[row] == nullptr) continue;
    Moments state;
    int zeros = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunk.n; i += kThreads) {
      double x[kOperands];
#pragma unroll
      for (int k = 0; k < kOperands; ++k) {
        x[k] = chunk.operands[k].data != nullptr ? double_of(chunk.operands[k], i) : 0;
      }
      const double root = sqrt(x[kVariance]);
      double value = times(x[kGrad], x[kMomentum]);
      if (row == kUpdate || row == kUpdateGrad) {
        value = change_of(chunk.method, x, root, constants);
        if (row == kUpdate) {
          zeros += is_unchanged(chunk.method, chunk.operands[kWeight].dtype, x[kWeight], value);
        } else {
          value = times(value, x[kGrad]);
        }
      } else if (row == kLag) {
        double lag;
        lag_root(x[kGrad], x[kVariance], root, constants, lag);
        value = times(times(lag, lag), constants.bc2);
        zeros += x[kVariance] < constants.least_variance;
      }
      update(state, value);
    }
    state.zeros = zeros;
    state = block_merge(state, shared);
    if (row != kUpdate) {
      const int64_t not_finite = state.count - finite_count(state);
      state = {state.count, state.zeros, not_finite, 0, 0, state.mean, 0, 0, 0};
    }
    if (threadIdx.x < 32) store(chunk.targets[row], state);
  }
}

}  // namespace paramstats::cuda
