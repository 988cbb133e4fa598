// The kernels of one SIMD level, and the sizes of blocks, parts and chunks.
#pragma once

#include <cstdint>

#include "../details.h"
#include "../dtypes.h"
#include "../moments.h"
#include "../updates.h"

namespace paramstats::cpu {

// Elements that are summed in SIMD lanes before the sums become a state. Large enough to make
// merging cheap. Small enough that a block that must be read again (64 KiB of float32) is still in
// L2, most of it in L1.
constexpr int64_t kBlock = 16384;

// A block whose lanes overflowed or contain NaN is read again in parts of this many elements. A
// part and its float64 copy fit in L1, and a single NaN makes only one part slow.
constexpr int64_t kPart = kBlock / 4;

// Elements that one thread reads at a time. Chunk boundaries depend on the tensor alone, so results
// do not depend on the number of threads. Sizes from 64 Ki to 1 Mi elements are equally fast.
constexpr int64_t kChunk = 8 * kBlock;

// The constants of the error bound (docs/accuracy.md): the elements of a float32 lane that are
// added up in a tile; the tiles that are added up before they are widened to float64, if the pivot
// is 0; and the largest accepted sum(d)^2 / n as a share of sum(d^2).
constexpr int kInner = 8;
constexpr int kTilesAtZero = 4;
constexpr double kMaxShiftShare = 1.0 / 16;

// Memory for kPart float64 values, one buffer per thread.
double* scratch();

// Summarizes n <= kChunk contiguous elements. (The counters in narrow lanes would overflow for
// more.)
using ChunkKernel = Moments (*)(const void* data, int64_t n);

// What `distribution` merges its elements into. `counts`: of negative elements by exponent, then of
// positive ones, 2 exponents_of(dtype).bins in total; added to.
struct ChunkDistribution {
  HigherMoments moments;
  MxCounts mx[kMxFormats];
  int64_t* counts;
};

// Computes the distribution of n <= kChunk contiguous elements, and returns their state. Blocks of
// kMxBlock begin at `data`.
using DistributionKernel = Moments (*)(const void* data, int64_t n, ChunkDistribution& out);

// A row is read in pieces of this many bytes, whose keys of the hash stay in L1.
constexpr int kRowPieceBytes = 8192;
constexpr int64_t row_piece(DType dtype) {  // elements
  const int64_t n = kRowPieceBytes / element_size(dtype);
  return n <= kPart ? n : kPart / 2;  // counters of 8 bits would overflow for more
}

// Key i of the hash of rows: a number that looks random (Steele, Lea, Flood: "Fast splittable
// pseudorandom number generators", OOPSLA 2014).
constexpr uint64_t hash_key(uint64_t i) {
  uint64_t z = i * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// Computes the states of `rows` adjacent rows, or pieces of one, of n <= row_piece(dtype)
// elements each. Returns the state of all of them.
using RowsKernel = Moments (*)(const void* data, int64_t rows, int64_t n, RowState* out);

// Elements of an update that are computed at a time, in buffers that stay in L1 and L2.
constexpr int64_t kUpdateBlock = 4096;

// Memory for 7 kUpdateBlock float64 values, one buffer per thread.
double* update_scratch();

// Contiguous elements of float64, float32, bfloat16 or float16; null: there is no such operand.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct UpdateOperands {
  Operand param, old, grad, momentum, variance;
  UpdateMethod method = UpdateMethod::kNone;
  StepConstants<float> in_float = {};
  StepConstants<double> in_double = {};
};

// Computes the rows of n <= kChunk elements of an update from element `begin` on. A row has no
// meaning if one of its operands is missing.
using UpdateKernel = void (*)(const UpdateOperands&, int64_t begin, int64_t n, Moments* rows);

struct Kernels {
  const char* name;
  ChunkKernel chunk[kDTypes];  // indexed by DType
  UpdateKernel update;
  DistributionKernel distribution[kDTypes];
  RowsKernel rows[kDTypes];
};

namespace plain {
extern const Kernels kKernels;
}
#if defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
}
#elif defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

}  // namespace paramstats::cpu
