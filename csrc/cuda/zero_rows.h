// Finds the parts of a chunk that are zero and belong to one row: one index of dimension 0. A part
// of kernels.h.
//
// The blocks that summarize chunks also do this, so that it needs no further launch and no wait. A
// chunk without zeros costs one comparison. Its elements are read again, from the cache, only if it
// has as many zeros as its smallest part, and has other elements, too. A warp tests a segment, a
// quarter of a chunk, and writes a bit for each part of a row in it to host memory, which the host
// combines (details.h).
#pragma once

#include "access.h"
#include "chunk.h"
#include "table.h"

namespace paramstats::cuda {

// Which bits of an element are zero if and only if it is 0: all but the sign of a float.
struct ZeroTest {
  uint32_t even, odd;  // of the words of a 16-byte load
  int log2_bytes;

  __device__ explicit ZeroTest(DType dtype) : log2_bytes(log2_size(dtype)) {
    even = odd = 0xffffffffu;
    if (dtype > DType::kFloat8E5M2) return;  // the floats come first
    odd = log2_bytes == 0 ? 0x7f7f7f7fu : log2_bytes == 1 ? 0x7fff7fffu : 0x7fffffffu;
    if (log2_bytes < 3) even = odd;
  }

  __device__ uint32_t load(const uint4* x) const {
    const uint4 v = __ldg(x);
    return ((v.x | v.z) & even) | ((v.y | v.w) & odd);
  }
  __device__ uint32_t load_element(const void* x, int i) const {
    switch (log2_bytes) {
      case 0: return __ldg(static_cast<const uint8_t*>(x) + i) & even;
      case 1: return __ldg(static_cast<const uint16_t*>(x) + i) & even;
      case 2: return __ldg(static_cast<const uint32_t*>(x) + i) & even;
      default:
        const uint64_t bits = __ldg(static_cast<const unsigned long long*>(x) + i);
        return static_cast<uint32_t>(bits) | (static_cast<uint32_t>(bits >> 32) & odd);
    }
  }
};

// Whether elements [begin, end) are all 0; a warp reads them until one is not.
__device__ inline bool are_zero(const ZeroTest& test, const void* data, int begin, int end) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % 32, size = 1 << test.log2_bytes;
  const char* first = static_cast<const char*>(data) + (static_cast<int64_t>(begin) * size);
  const int misaligned = static_cast<int>(reinterpret_cast<uint64_t>(first) % 16);
  const int to_aligned = (16 - misaligned) % 16 / size;
  const int head = to_aligned < end - begin ? to_aligned : end - begin;
  const int vectors = (end - begin - head) * size / 16;
  const int tail = begin + head + vectors * 16 / size;
  const int i = lane < 16 ? begin + lane : tail + lane - 16;  // before and after the vectors
  const bool has_one = i < (lane < 16 ? begin + head : end);
  if (__ballot_sync(kAllLanes, has_one && test.load_element(data, i) != 0)) return false;
  const auto* x = reinterpret_cast<const uint4*>(first + head * size);
#pragma unroll 1
  for (int v = lane; v - lane < vectors; v += 32 * kUnroll) {
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (v + 32 * k < vectors) bits |= test.load(x + v + 32 * k);
    }
    if (__ballot_sync(kAllLanes, bits != 0)) return false;
  }
  return true;
}

// Writes the bits of a segment: elements [begin, end) of a chunk, which follow `before` elements of
// the tensor.
__device__ inline void find_zero_parts(const ZeroTest& test, const void* data, int begin, int end,
                                       int64_t before, int64_t inner, uint32_t* words) {
  const int lane = threadIdx.x % 32;
  const int64_t first_row = before / inner;
  const int64_t to_row = first_row * inner - before + begin;  // where it begins; may be below 0
  const int parts = static_cast<int>((before + (end - begin) - 1) / inner - first_row) + 1;
  const bool is_short = inner < 32;
  uint32_t mine = 0;  // the words of a warp are stored together
#pragma unroll 1
  for (int part = 0; part < parts; part += 32) {
    uint32_t word = 0;
    const int n = is_short || parts - part > 32 ? 32 : parts - part;
    // A thread tests a short part, and a warp a long one.
#pragma unroll 1
    for (int k = is_short ? 31 : 0; k < n; ++k) {
      const int64_t row = to_row + (part + (is_short ? lane : k)) * inner;
      const int from = static_cast<int>(row > begin ? row : begin);
      const int to = static_cast<int>(row + inner < end ? row + inner : end);
      if (is_short) {
        uint32_t bits = from < to ? 0 : 1;
#pragma unroll 1
        for (int i = from; i < to; ++i) bits |= test.load_element(data, i);
        word = __ballot_sync(kAllLanes, bits == 0);
      } else {
        word |= are_zero(test, data, from, to) ? 1u << k : 0u;
      }
    }
    const int at = part / 32;
    if (at % 32 == lane) mine = word;
    if (at % 32 == 31 || part + 32 >= parts) {
      if (lane <= at % 32) words[at / 32 * 32 + lane] = mine;
    }
  }
}

// Finds the zero parts of this block's chunk, which has `zeros` > 0 zeros. It is not inlined and
// finds its chunk again, so that reading a chunk needs no registers for it.
__device__ __noinline__ void find_zero_rows(const Arguments& arguments, int64_t zeros) {
  const Entry* entries = entries_of(arguments);
  const uint32_t t = find_entry<&Entry::first_chunk>(entries, arguments.size, blockIdx.x);
  char* host = reinterpret_cast<char*>(arguments.rows);
  const ZeroRowsEntry rows = reinterpret_cast<ZeroRowsEntry*>(arguments.rows + arguments.size)[t];
  if (rows.inner == 0) return;
  const Entry tensor = entries[t];
  const DType dtype = tensor.dtype();
  const int64_t size = chunk_size(tensor.numel(), dtype);
  const int64_t index = blockIdx.x - tensor.first_chunk, before = index * size;
  const int64_t n = tensor.numel() - before < size ? tensor.numel() - before : size;
  const int64_t first = rows.inner - before % rows.inner, last = (before + n - 1) % rows.inner + 1;
  if (zeros < n && zeros < (first < last ? first : last)) return;
  if (threadIdx.x == 0) {
    host[rows.flags + index] = zeros == n ? kAllPartsZero : kSomePartsTested;
  }
  if (zeros == n) return;
  const int warp = threadIdx.x / 32;
  const int64_t segment = size / kSegments, begin = warp * segment;
  if (begin >= n) return;
  const int64_t end = begin + segment < n ? begin + segment : n;
  auto* words = reinterpret_cast<uint32_t*>(host + rows.words);
  words += (index * kSegments + warp) * segment_words(tensor.numel(), dtype, rows.inner);
  const auto* data = static_cast<const char*>(tensor.data) + (before << log2_size(dtype));
  find_zero_parts(ZeroTest(dtype), data, static_cast<int>(begin), static_cast<int>(end),
                  before + begin, rows.inner, words);
}

}  // namespace paramstats::cuda
