// Reads details of tensors chunk by chunk.
#include "details.h"

#include <algorithm>
#include <cstring>

namespace paramstats::cpu {
namespace {

constexpr int64_t kBufferBytes = 64 << 10;  // stays in L2
alignas(64) thread_local char buffer[kBufferBytes];
thread_local int64_t chunk_counts[2 * kWide.bins];

void add(int64_t& to, int64_t n) {
  if (n != 0) __atomic_fetch_add(&to, n, __ATOMIC_RELAXED);
}

// Merges two parts of a row with `finite_a` and `finite_b` finite elements. The hash of b gets the
// factor `key`.
RowState merge(const RowState& a, int64_t finite_a, const RowState& b, int64_t finite_b,
               uint64_t key) {
  const Moments both = paramstats::merge({finite_a, 0, 0, 0, 0, a.mean, a.m2, 0, 0},
                                         {finite_b, 0, 0, 0, 0, b.mean, b.m2, 0, 0});
  return {both.mean,
          both.m2,
          std::max(a.abs_max, b.abs_max),
          a.zeros + b.zeros,
          a.nonfinite + b.nonfinite,
          a.hash + key * b.hash};
}

}  // namespace

void Details::prepare(const TensorView& t) {
  if (has_distribution) {
    counts.assign(size_t{2} * exponents_of(t.dtype).bins, 0);
    moments_.resize(ceil_div(t.numel, kChunk));
  }
  if (rows == nullptr || t.numel == 0) return;
  const int64_t row_numel = t.numel / t.rows;
  if (!is_contiguous(t)) {
    row_dims_ = dims_of_rows(t);
    const bool has_rows_in_order = t.rows == 1 || t.strides[0] == row_numel;
    if (has_rows_in_order && is_dense(memory_order(t))) row_dims_.clear();
  }
  const int64_t pieces = ceil_div(row_numel, row_piece(t.dtype));
  if (pieces > 1) pieces_.resize(t.rows * pieces);
}

// Reads the pieces of rows whose first element is in [begin, end).
Moments Details::read_rows(const TensorView& t, int64_t begin, int64_t end,
                           const Kernels& kernels) {
  const RowsKernel kernel = kernels.rows[static_cast<int>(t.dtype)];
  const int size = element_size(t.dtype);
  const int64_t row_numel = t.numel / t.rows, piece = row_piece(t.dtype);
  const int64_t pieces = ceil_div(row_numel, piece);  // of a row
  Moments state;
  int64_t row = begin / row_numel, in_row = ceil_div(begin % row_numel, piece);
  while (row < t.rows) {
    if (in_row == pieces) {
      ++row;
      in_row = 0;
      continue;
    }
    const int64_t first = row * row_numel + in_row * piece;
    if (first >= end) break;
    const int64_t n = std::min(piece, row_numel - in_row * piece);
    RowState* const out = pieces == 1 ? rows + row : pieces_.data() + row * pieces + in_row;
    int64_t number = pieces == 1 ? ceil_div(end, row_numel) - row : 1;
    const void* data = static_cast<const char*>(t.data) + first * size;
    if (!row_dims_.empty()) {
      number = std::min(number, kBufferBytes / size / n);
      gather(t.data, row_dims_, first, number * n, size, buffer);
      data = buffer;
    }
    state = paramstats::merge(state, kernel(data, number, n, out));
    (pieces == 1 ? row : in_row) += number;
  }
  return state;
}

Moments Details::read_distribution(const TensorView& t, const std::vector<Dim>* dims, int64_t begin,
                                   int64_t end, const Kernels& kernels) {
  const DistributionKernel kernel = kernels.distribution[static_cast<int>(t.dtype)];
  const int size = element_size(t.dtype);
  ChunkDistribution out = {{}, {}, chunk_counts};
  Moments state;
  std::fill_n(chunk_counts, counts.size(), 0);
  if (dims == nullptr) {
    state = kernel(static_cast<const char*>(t.data) + begin * size, end - begin, out);
  } else {
    const int64_t part = kBufferBytes / size;  // whole blocks of kMxBlock
    for (int64_t i = begin; i < end; i += part) {
      const int64_t n = std::min(part, end - i);
      gather(t.data, *dims, i, n, size, buffer);
      state = paramstats::merge(state, kernel(buffer, n, out));
    }
  }
  moments_[begin / kChunk] = out.moments;
  for (int f = 0; f < kMxFormats; ++f) {
    add(head.mx[f].underflow, out.mx[f].underflow);
    add(head.mx[f].overflow, out.mx[f].overflow);
  }
  for (size_t k = 0; k < counts.size(); ++k) add(counts[k], chunk_counts[k]);
  return state;
}

void Details::finish(const TensorView& t) {
  if (has_distribution) {
    for (const HigherMoments& chunk : moments_) head.moments = merge(head.moments, chunk);
    head.moments = packed(head.moments);
    const ExponentRange range = exponents_of(t.dtype);
    const auto is_empty = [&](int k) { return counts[k] == 0 && counts[range.bins + k] == 0; };
    int begin = 0, end = range.bins;
    while (begin < end && is_empty(begin)) ++begin;
    while (begin < end && is_empty(end - 1)) --end;
    if (begin < end) head.first = range.first + begin;
    head.bins = end - begin;
    const auto all = counts.begin();
    std::copy(all + begin, all + end, all);
    std::copy(all + range.bins + begin, all + range.bins + end, all + head.bins);
    counts.resize(2 * head.bins);
  }
  if (pieces_.empty()) return;
  const int64_t row_numel = t.numel / t.rows, piece = row_piece(t.dtype);
  const RowState* part = pieces_.data();
  for (int64_t r = 0; r < t.rows; ++r) {
    RowState row = *part++;
    for (int64_t begin = piece; begin < row_numel; begin += piece) {
      const int64_t n = std::min(piece, row_numel - begin);
      row = cpu::merge(row, begin - row.nonfinite, *part, n - part->nonfinite,
                       hash_key(begin / piece) | 1);
      ++part;
    }
    rows[r] = row;
  }
}

}  // namespace paramstats::cpu
