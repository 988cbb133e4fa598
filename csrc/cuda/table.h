// The tensors and updates of a call, how they are divided, and the arguments of the kernels; for
// host and device.
#pragma once

#include "../details.h"
#include "../dtypes.h"
#include "../moments.h"
#include "../updates.h"

namespace paramstats::cuda {

// A tensor without gaps. In memory, it is a sequence of runs of `inner` elements that have the same
// index of dimension 0. (If that is the outermost dimension in memory, a run is a row.)
struct TensorView {
  const void* data;  // aligned to its elements
  int64_t numel;
  DType dtype;
  uint8_t details = 0;  // kReadDistribution, kReadRows
  int64_t size0 = 0;    // of dimension 0; 0 if there is none
  int64_t inner = 0;
};

// A tensor with at least one element, as the kernels find it. Data type and size share a word, so
// that more tensors fit into the arguments of a kernel.
class Entry {
 public:
  Entry() = default;
  PARAMSTATS_HD Entry(const TensorView& t, uint32_t first_chunk, uint32_t first_group)
      : data(t.data),
        first_chunk(first_chunk),
        first_group(first_group),
        packed_(static_cast<uint64_t>(t.dtype) << kNumelBits | static_cast<uint64_t>(t.numel)) {}

  PARAMSTATS_HD int64_t numel() const {
    return static_cast<int64_t>(packed_ & ((uint64_t{1} << kNumelBits) - 1));
  }
  PARAMSTATS_HD DType dtype() const { return static_cast<DType>(packed_ >> kNumelBits); }

  const void* data;
  uint32_t first_chunk, first_group;  // chunks and groups of all tensors before this one

 private:
  static constexpr int kNumelBits = 56;
  uint64_t packed_;
};
static_assert(sizeof(Entry) == 24, "kInlineEntries assumes it");

// ---- updates -----------------------------------------------------------------------------------

// The tensors of an update.
enum Operand { kWeight, kGrad, kMomentum, kVariance, kOld, kOperands };

// An element of memory, or all of them, without gaps. data is null if there is none.
struct Array {
  const void* data = nullptr;  // aligned to its elements
  DType dtype = DType::kFloat32;
};

// The update of a parameter (updates.h). Its operands are float64, float32, bfloat16 or float16,
// and have the same number of elements in the same order.
struct UpdateView {
  Array operands[kOperands];
  Array step_tensor;  // one element of any dtype that contains the step; if none, `step` is it
  UpdateMethod method;
  int64_t numel;
  Hyperparameters hyperparameters;
  double step;

  PARAMSTATS_HD bool has(Operand k) const { return operands[k].data != nullptr; }

  // Whether a row can be computed. An update has only these rows in a table.
  PARAMSTATS_HD bool has(UpdateRow row) const {
    const bool has_change =
        (method == UpdateMethod::kDifference && has(kWeight) && has(kOld)) ||
        (method == UpdateMethod::kFormula && has(kWeight) && has(kMomentum) && has(kVariance));
    switch (row) {
      case kUpdate: return has_change;
      case kGradMomentum: return has(kGrad) && has(kMomentum);
      case kUpdateGrad: return has_change && has(kGrad);
      default: return has(kGrad) && has(kVariance);
    }
  }
};

// An update with at least one element, as the kernels find it. Its rows are entries without data in
// the table of the tensors, so that their states are merged as those of tensors.
struct UpdateEntry {
  UpdateView view;
  uint32_t first_chunk;  // chunks of all updates before this one
  uint32_t first_row;    // the entry of its first row
};

// Updates are divided into chunks as if their elements were float64.
constexpr DType kUpdateRowDType = DType::kFloat64;

// ---- chunks and groups -------------------------------------------------------------------------

constexpr int kThreads = 128;       // of a block that reads a chunk
constexpr int kMergeThreads = 128;  // of a block that merges: four independent warps

// Bytes of a tensor that one block reads. They depend on the tensor alone, so that its result does
// not depend on other tensors. A block needs several microseconds for a large chunk. That would be
// the time of a whole call with a few small tensors, while most of the device is idle, so those are
// divided more finely. (The sizes have not been measured yet.)
constexpr int kLargeChunk = 1 << 17, kSmallChunk = 1 << 15;
constexpr int64_t kLargeTensor = int64_t{1} << 22;  // bytes

PARAMSTATS_HD constexpr int log2_chunk_bytes(int64_t numel, DType dtype) {
  return numel >= kLargeTensor >> log2_size(dtype) ? 17 : 15;
}
static_assert(kLargeChunk == 1 << log2_chunk_bytes(kLargeTensor, DType::kInt8) &&
              kSmallChunk == 1 << log2_chunk_bytes(kLargeTensor - 1, DType::kInt8));

PARAMSTATS_HD constexpr int64_t chunk_size(int64_t numel, DType dtype) {  // elements
  return int64_t{1} << (log2_chunk_bytes(numel, dtype) - log2_size(dtype));
}

PARAMSTATS_HD constexpr int64_t chunk_count(int64_t numel, DType dtype) {
  const int shift = log2_chunk_bytes(numel, dtype) - log2_size(dtype);
  return ((numel - 1) >> shift) + 1;
}

// A warp merges the states of a group of adjacent chunks of a tensor, one by each thread.
constexpr int kGroup = 32;

// The groups of a tensor. The state of an only chunk is the result, and there is nothing to merge.
PARAMSTATS_HD constexpr int64_t group_count(int64_t chunks) {
  return chunks > 1 ? (chunks + kGroup - 1) / kGroup : 0;
}

// ---- zero rows ---------------------------------------------------------------------------------

constexpr int kSegments = kThreads / 32;  // of a chunk: one for each warp

// Where the host finds which parts of a tensor's runs are zero, in bytes after the results: a flag
// for each chunk, and words of bits for each segment of a chunk whose flag is kSomePartsTested.
struct ZeroRowsEntry {
  int64_t inner;  // elements of a run; 0 if zero rows are not looked for
  int64_t flags, words;
};
constexpr char kNoPartZero = 0, kSomePartsTested = 1, kAllPartsZero = 2;

// The words of bits of a segment: as many elements belong to at most so many runs.
PARAMSTATS_HD constexpr int64_t segment_words(int64_t numel, DType dtype, int64_t inner) {
  const int64_t segment = chunk_size(numel, dtype) / kSegments;
  const int64_t n = numel < segment ? numel : segment;
  return ((n + inner - 2) / inner + 1 + 31) / 32;
}

PARAMSTATS_HD constexpr int64_t segment_count(int64_t numel, DType dtype) {
  const int64_t segment = chunk_size(numel, dtype) / kSegments;
  return (numel - 1) / segment + 1;
}

// ---- distributions -----------------------------------------------------------------------------

// A block reads a span of adjacent chunks: one, or several where a tensor has so many that merging
// their states would take long.
PARAMSTATS_HD constexpr int64_t span_chunks(int64_t chunks) { return chunks > 1024 ? 8 : 1; }
PARAMSTATS_HD constexpr int64_t span_count(int64_t chunks) {
  return (chunks - 1) / span_chunks(chunks) + 1;
}

// The counts of a distribution: two for each format of blocks, then those by sign and exponent.
constexpr int kMxWords = 2 * kMxFormats;
PARAMSTATS_HD constexpr int64_t distribution_words(DType dtype) {
  return kMxWords + 2 * exponents_of(dtype).bins;
}

// A tensor whose distribution is read.
struct DistributionEntry {
  uint32_t tensor;      // its entry
  uint32_t first_span;  // spans of all distributions before this one
  int64_t counts;       // its first count, in device memory
  int64_t out;          // bytes after the results: a DistributionHead and the counts of all bins
};

// ---- arguments ---------------------------------------------------------------------------------

constexpr int kArgumentBytes = 4096;  // the limit of drivers before CUDA 12.1 and GPUs before Volta
constexpr int kInlineEntries = 169;

struct Table {
  const Entry* entries;  // in device memory; null if they are inline
  Moments* rows;         // results, by entry, in host memory; a ZeroRowsEntry per tensor follows
  Moments* states;       // by chunk
  uint32_t* merged;      // number of merged groups, by entry
  uint32_t size;         // entries: tensors, then rows of updates
  uint32_t groups;
};

// The argument of the kernels that read tensors and merge. Up to kInlineEntries tensors, without
// updates, are a part of it and need no copy to the device.
struct Arguments : Table {
  Entry inline_entries[kInlineEntries];
};
static_assert(sizeof(Arguments) <= kArgumentBytes && sizeof(Entry) + sizeof(Arguments) > 4096);

// The argument of the kernel that reads updates.
struct UpdateTable : Table {
  const UpdateEntry* updates;  // in device memory, as the entries
  uint32_t n;
};

// The argument of the kernels that read distributions.
struct DistributionTable : Table {
  const DistributionEntry* distributions;  // in device memory, as the entries
  uint32_t n;
  HigherMoments* moments;      // by span
  unsigned long long* counts;  // by distribution: zeros before the launch
};

}  // namespace paramstats::cuda
