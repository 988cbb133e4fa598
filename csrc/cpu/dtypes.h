// The element types that the CPU kernels read as they lie in memory.
#pragma once

#include <cstdint>

namespace paramstats::cpu {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat8E4M3FN,
  kFloat8E5M2,
  kInt8,
  kUInt8,
  kBool,  // a byte; any but 0 is true
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
};
constexpr int kDTypes = 15;

constexpr int element_size(DType dtype) {
  constexpr int kBytes[kDTypes] = {8, 4, 2, 2, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8};
  return kBytes[static_cast<int>(dtype)];
}

}  // namespace paramstats::cpu
