// What the kernels of one SIMD level offer, and the sizes they work in.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../moments.h"

namespace paramstats::cpu {

// Elements whose sums are kept in SIMD lanes before they become a state: enough to make the joining
// of states cheap, few enough that a block which must be read again (64 KiB of float32) is still in
// L2, most of it in L1.
constexpr int64_t kBlock = 16384;

// A block that its lanes could not hold is tried again in parts of so many elements: they and their
// float64 copy are in L1, and one NaN makes no more than that slow.
constexpr int64_t kPart = kBlock / 4;

// Elements that one thread takes at a time. Part boundaries depend on the tensor alone, so results
// do not depend on the number of threads. From 64 Ki to 1 Mi elements make no difference in speed.
constexpr int64_t kChunk = 8 * kBlock;

// What the error bound is made of (docs/accuracy.md): additions in a float32 lane before it is
// widened, and the share of a block's squares that its pivot's distance from its mean may make up.
constexpr int kInner = 8;
constexpr double kMostOff = 1.0 / 16;

// Room for a part's elements as float64, of each thread its own: more than a small thread's stack
// holds, and needed by few.
double* scratch();

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
