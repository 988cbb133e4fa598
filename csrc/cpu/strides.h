// Sorts the dimensions of a strided tensor by stride, and copies elements of tensors with gaps.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "engine.h"

namespace paramstats::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor of fewer than 2^63 elements has at most this many dimensions of size 2 or more.
constexpr int kMaxDims = 63;

struct Dim {
  int64_t size;
  int64_t stride;  // in elements; 0 for an expanded dimension
};

// Describes the elements with as few dimensions as possible: drops dimensions of size 1, sorts the
// others by stride (largest first) and joins adjacent dimensions without a gap between them. A
// dense tensor, permuted or not, becomes one dimension of stride 1; a scalar has none.
inline std::vector<Dim> memory_order(const TensorView& t) {
  std::vector<Dim> dims;
  dims.reserve(t.ndim);
  for (int i = 0; i < t.ndim; ++i) {
    if (t.sizes[i] == 1) continue;
    const Dim dim{t.sizes[i], t.strides[i]};
    auto at = dims.end();  // insertion sort, stable: tensors have few dimensions
    while (at != dims.begin() && (at - 1)->stride < dim.stride) --at;
    dims.insert(at, dim);
  }
  size_t last = 0;
  for (size_t i = 1; i < dims.size(); ++i) {
    if (dims[last].stride == dims[i].size * dims[i].stride) {
      dims[last] = {dims[last].size * dims[i].size, dims[i].stride};
    } else {
      dims[++last] = dims[i];
    }
  }
  if (!dims.empty()) dims.resize(last + 1);
  return dims;
}

// Whether a tensor is contiguous. A fast check for the common case, without calling memory_order.
inline bool is_contiguous(const TensorView& t) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.sizes[i] == 1) continue;
    if (t.strides[i] != expected) return false;
    expected *= t.sizes[i];
  }
  return true;
}

inline bool is_dense(const std::vector<Dim>& dims) {
  return dims.empty() || (dims.size() == 1 && dims[0].stride == 1);
}

// The dimensions of the elements in the order of rows.
inline std::vector<Dim> dims_of_rows(const TensorView& t) {
  TensorView row = t;
  ++row.sizes;
  ++row.strides;
  --row.ndim;
  std::vector<Dim> dims = memory_order(row);
  if (dims.empty()) dims.push_back({1, 1});
  dims.insert(dims.begin(), {t.sizes[0], t.strides[0]});
  return dims;
}

// Whether the elements of two tensors without gaps have the same order in memory. (`ndim` is 0 for
// contiguous tensors, whose shapes may differ.)
inline bool have_same_layout(const TensorView& a, const TensorView& b) {
  if (a.numel != b.numel || a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.sizes[d] != b.sizes[d] || a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// Copies elements [begin, begin + n) of `dims`, the result of memory_order, to `to`.
template <class T>
void gather(const void* data, const std::vector<Dim>& dims, int64_t begin, int64_t n, void* to) {
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(to);
  int64_t index[kMaxDims];
  int64_t rest = begin, offset = 0;
  for (size_t d = dims.size(); d-- > 0;) {
    index[d] = rest % dims[d].size;
    rest /= dims[d].size;
    offset += index[d] * dims[d].stride;
  }
  const Dim inner = dims.back();
  int64_t& column = index[dims.size() - 1];
  while (n > 0) {
    const int64_t remaining = inner.size - column;
    const int64_t run = remaining < n ? remaining : n;
    for (int64_t i = 0; i < run; ++i) {  // memcpy, because addresses may be unaligned
      std::memcpy(out + i, x + offset + i * inner.stride, sizeof(T));
    }
    out += run;
    n -= run;
    offset += run * inner.stride;
    column += run;
    for (size_t d = dims.size() - 1; d > 0 && index[d] == dims[d].size; --d) {  // carry
      offset += dims[d - 1].stride - dims[d].size * dims[d].stride;
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

inline void gather(const void* data, const std::vector<Dim>& dims, int64_t begin, int64_t n,
                   int element_size, void* to) {
  switch (element_size) {
    case 1: return gather<uint8_t>(data, dims, begin, n, to);
    case 2: return gather<uint16_t>(data, dims, begin, n, to);
    case 4: return gather<uint32_t>(data, dims, begin, n, to);
    default: return gather<uint64_t>(data, dims, begin, n, to);
  }
}

}  // namespace paramstats::cpu
