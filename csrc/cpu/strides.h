// Puts the dimensions of a strided tensor in memory order and walks what does not lie side by side.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "engine.h"

namespace paramstats::cpu {

// Dimensions of two elements or more that a tensor of fewer than 2^63 elements can have.
constexpr int kMostDims = 63;

struct Dim {
  int64_t size;
  int64_t stride;  // elements; 0 where a tensor is expanded
};

// The same elements with the fewest dimensions: those of size 1 dropped, the rest in order of
// stride, largest first, neighbours joined where one continues the other. A dense tensor, permuted
// or not, comes out as one dimension of stride 1 (a scalar as none).
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

// True where memory_order would find one run of neighbours, told without building it for the
// common case of a contiguous tensor.
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

// Copies elements [begin, begin + n) of the memory order to `to`.
template <class T>
void gather(const void* data, const std::vector<Dim>& dims, int64_t begin, int64_t n, void* to) {
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(to);
  int64_t index[kMostDims];
  int64_t rest = begin, offset = 0;
  for (size_t d = dims.size(); d-- > 0;) {
    index[d] = rest % dims[d].size;
    rest /= dims[d].size;
    offset += index[d] * dims[d].stride;
  }
  const Dim inner = dims.back();
  int64_t& column = index[dims.size() - 1];
  while (n > 0) {
    const int64_t left = inner.size - column;
    const int64_t run = left < n ? left : n;
    for (int64_t i = 0; i < run; ++i) {  // from any address: a tensor may begin at an odd one
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
