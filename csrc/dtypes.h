// The element types that the kernels read.
#pragma once

#include "portable.h"

namespace paramstats {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat8E4M3FN,
  kFloat8E5M2,
  kInt8,
  kUInt8,
  kBool,  // one byte; every value but 0 is true
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
};
constexpr int kDTypes = 15;

// log2 of the size of each dtype in bytes, two bits per dtype. A table would be a memory access on
// a GPU, and a switch would be a jump that a CPU mispredicts.
constexpr uint32_t kLog2Sizes = 3 << 0 | 2 << 2 | 1 << 4 | 1 << 6 | 0 << 8 | 0 << 10 | 0 << 12 |
                                0 << 14 | 0 << 16 | 1 << 18 | 1 << 20 | 2 << 22 | 2 << 24 |
                                3u << 26 | 3u << 28;

PARAMSTATS_HD constexpr int log2_size(DType dtype) {
  return static_cast<int>(kLog2Sizes >> (2 * static_cast<int>(dtype)) & 3);
}

PARAMSTATS_HD constexpr int element_size(DType dtype) { return 1 << log2_size(dtype); }

static_assert(element_size(DType::kFloat64) == 8 && element_size(DType::kFloat32) == 4 &&
              element_size(DType::kFloat16) == 2 && element_size(DType::kFloat8E5M2) == 1 &&
              element_size(DType::kBool) == 1 && element_size(DType::kUInt16) == 2 &&
              element_size(DType::kUInt32) == 4 && element_size(DType::kUInt64) == 8);

}  // namespace paramstats
