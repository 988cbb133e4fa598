// A tensor of any dtype and layout with random contents, and its states by the CPU backend.
#pragma once

#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "check.h"
#include "oracle.h"

namespace paramstats::test {

using Shape = std::vector<int64_t>;

inline oracle::Rng rng(oracle::kSeed);

inline double noise() { return std::normal_distribution<double>()(rng); }

inline std::string name_of(DType dtype) {
  static const char* kNames[kDTypes] = {"float64", "float32", "bfloat16", "float16", "e4m3fn",
                                        "e5m2",    "int8",    "uint8",    "bool",    "int16",
                                        "uint16",  "int32",   "uint32",   "int64",   "uint64"};
  return kNames[static_cast<int>(dtype)];
}

inline std::vector<DType> all_dtypes() {
  std::vector<DType> out;
  for (int i = 0; i < kDTypes; ++i) out.push_back(static_cast<DType>(i));
  return out;
}

// Dtypes that float32 cannot represent exactly are summed in float64.
inline const oracle::Bounds& bounds(DType dtype) {
  return dtype == DType::kFloat64 || dtype >= DType::kInt32 ? oracle::kDoubleLanes
                                                            : oracle::kFloatLanes;
}

// Its memory ends with the last element, so that the address sanitizer sees any read beyond it.
struct Tensor {
  DType dtype;
  Shape sizes, strides;
  int64_t first;  // elements before the first one; moves the tensor off vector boundaries
  std::vector<unsigned char> memory;

  Tensor(DType dtype, Shape sizes, Shape strides, int64_t first = 0)
      : dtype(dtype), sizes(sizes), strides(strides), first(first) {
    int64_t extent = 1;
    for (size_t d = 0; d < sizes.size(); ++d) extent += (sizes[d] - 1) * strides[d];
    memory.resize((first + (numel() > 0 ? extent : 0)) * element_size(dtype));
    fill([=](int64_t) { return oracle::random_bits(dtype, rng); });
  }
  Tensor(DType dtype, int64_t n, int64_t first = 0) : Tensor(dtype, Shape{n}, Shape{1}, first) {}

  template <class Bits>
  void fill(Bits bits_at) {  // sets every element in memory, including those in gaps
    const int64_t n = static_cast<int64_t>(memory.size()) / element_size(dtype);
    for (int64_t i = 0; i < n; ++i) set(i, bits_at(i));
  }
  void set(int64_t i, uint64_t bits) {  // little-endian, like all machines we support
    std::memcpy(memory.data() + i * element_size(dtype), &bits, element_size(dtype));
  }
  int64_t numel() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
  }
  const unsigned char* data() const { return memory.data() + first * element_size(dtype); }
  cpu::TensorView view() const {
    return {data(),
            dtype,
            numel(),
            static_cast<int>(sizes.size()),
            sizes.data(),
            strides.data(),
            sizes.empty() ? 0 : sizes[0]};
  }
  std::vector<double> values() const {  // in row-major order of the logical index
    std::vector<double> out;
    for (int64_t i = 0; i < numel(); ++i) {
      int64_t rest = i, offset = 0;
      for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) {
        offset += rest % sizes[d] * strides[d];
      }
      uint64_t bits = 0;
      std::memcpy(&bits, data() + offset * element_size(dtype), element_size(dtype));
      out.push_back(oracle::decode(dtype, bits));
    }
    return out;
  }
};
using Tensors = std::vector<Tensor>;

inline std::vector<Moments> cpu_states(const Tensors& tensors, const cpu::Kernels& kernels,
                                       cpu::Pool pool = nullptr) {
  std::vector<Moments> states(tensors.size());
  std::vector<cpu::TensorView> views;
  std::vector<Moments*> out;
  for (size_t i = 0; i < tensors.size(); ++i) {
    states[i].count = -7;  // must be overwritten
    views.push_back(tensors[i].view());
    out.push_back(&states[i]);
  }
  cpu::summarize(views, out, kernels, pool);
  return states;
}

}  // namespace paramstats::test
