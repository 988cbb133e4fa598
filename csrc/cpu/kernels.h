// What the kernels of one SIMD level offer, and the sizes they work in.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../moments.h"

namespace paramstats::cpu {

// Elements whose sums are kept in SIMD lanes before they become a state. 4,096 float32 are 16 KiB:
// a block that must be read twice is still in L1, and with its float64 copy in L2.
constexpr int64_t kBlock = 4096;

// Elements that one thread takes at a time. Part boundaries depend on the tensor alone, so results
// do not depend on the number of threads. From 64 Ki to 1 Mi elements make no difference in speed.
constexpr int64_t kChunk = 32 * kBlock;

// Summarises n <= kChunk elements that lie side by side: counters in narrow lanes hold no more.
using ChunkKernel = Moments (*)(const void* data, int64_t n);

struct Kernels {
  const char* name;
  ChunkKernel chunk[kDTypes];  // indexed by DType
};

namespace plain {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

}  // namespace paramstats::cpu
