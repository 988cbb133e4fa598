// Reads details of tensors chunk by chunk, and finds zero rows.
#include "details.h"

#include <algorithm>
#include <cstring>

namespace paramstats::cpu {
namespace {

constexpr int64_t kBufferBytes = 64 << 10;  // stays in L2
alignas(64) thread_local char buffer[kBufferBytes];
thread_local int64_t chunk_counts[2 * kWide.bins];

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The dimensions of the elements in the order of rows.
std::vector<Dim> dims_of_rows(const TensorView& t) {
  TensorView row = t;
  ++row.sizes;
  ++row.strides;
  --row.ndim;
  std::vector<Dim> dims = memory_order(row);
  if (dims.empty()) dims.push_back({1, 1});
  dims.insert(dims.begin(), {t.sizes[0], t.strides[0]});
  return dims;
}

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

void Details::read_distribution(const TensorView& t, const std::vector<Dim>* dims, int64_t begin,
                                int64_t end, const Kernels& kernels) {
  const DistributionKernel kernel = kernels.distribution[static_cast<int>(t.dtype)];
  const int size = element_size(t.dtype);
  ChunkDistribution out = {{}, {}, chunk_counts};
  std::fill_n(chunk_counts, counts.size(), 0);
  if (dims == nullptr) {
    kernel(static_cast<const char*>(t.data) + begin * size, end - begin, out);
  } else {
    const int64_t part = kBufferBytes / size;  // whole blocks of kMxBlock
    for (int64_t i = begin; i < end; i += part) {
      const int64_t n = std::min(part, end - i);
      gather(t.data, *dims, i, n, size, buffer);
      kernel(buffer, n, out);
    }
  }
  moments_[begin / kChunk] = out.moments;
  for (int f = 0; f < kMxFormats; ++f) {
    add(head.mx[f].underflow, out.mx[f].underflow);
    add(head.mx[f].overflow, out.mx[f].overflow);
  }
  for (size_t k = 0; k < counts.size(); ++k) add(counts[k], chunk_counts[k]);
}

void Details::finish(const TensorView& t) {
  if (has_distribution) {
    for (const HigherMoments& chunk : moments_) head.moments = merge(head.moments, chunk);
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

// ---- zero rows ---------------------------------------------------------------------------------

namespace {

// The bits of 8 bytes of elements that a zero does not have, as it may have a sign.
uint64_t value_bits(DType dtype) {
  if (dtype > DType::kFloat8E5M2) return ~uint64_t{0};
  constexpr uint64_t kSigns[] = {0x8080808080808080, 0x8000800080008000, 0x8000000080000000,
                                 0x8000000000000000};
  return ~kSigns[log2_size(dtype)];
}

bool is_zero(const char* x, int64_t bytes, uint64_t mask) {
  constexpr int kWords = 8;
  uint64_t words[kWords];
  int64_t i = 0;
  words[0] = 0;
  std::memcpy(words, x, bytes < 8 ? bytes : 8);
  if (words[0] & mask) return false;  // as in most rows
  if (bytes <= 8) return true;
  for (; i + int64_t{sizeof(words)} <= bytes; i += sizeof(words)) {
    std::memcpy(words, x + i, sizeof(words));
    uint64_t any = 0;
    for (uint64_t word : words) any |= word;
    if (any & mask) return false;
  }
  std::memset(words, 0, sizeof(words));
  std::memcpy(words, x + i, bytes - i);
  uint64_t any = 0;
  for (uint64_t word : words) any |= word;
  return (any & mask) == 0;
}

}  // namespace

ZeroRowFinder::ZeroRowFinder(const TensorView& t)
    : tensor_(t),
      row_numel_(t.numel / t.rows),
      stride_(row_numel_),
      value_bits_(value_bits(t.dtype)) {
  if (is_contiguous(t)) return;
  dims_ = dims_of_rows(t);
  stride_ = dims_[0].stride;
  dims_.erase(dims_.begin());
  if (dims_.size() == 1 && (dims_[0].stride == 1 || dims_[0].size == 1)) dims_.clear();
}

std::vector<uint8_t> ZeroRowFinder::find(int64_t zeros, const std::vector<int64_t>& in_chunks,
                                         Pool pool) const {
  const int64_t rows = tensor_.rows;
  std::vector<uint8_t> bits(ceil_div(rows, 8));
  struct Search {
    const ZeroRowFinder& finder;
    const std::vector<int64_t>& in_chunks;
    int64_t rows, step;  // of a task; tasks write no byte of another
    uint8_t* bits;
  } search{*this, in_chunks, rows, 8 * ceil_div(kChunk / 8, row_numel_), bits.data()};
  const auto task = [](int64_t i, void* context) {
    const Search& s = *static_cast<const Search*>(context);
    const int64_t begin = i * s.step, end = std::min(s.rows, begin + s.step);
    if (s.finder.has_zeros(begin, end, s.in_chunks)) s.finder.read(begin, end, s.bits);
  };
  const int64_t tasks = ceil_div(rows, search.step);
  if (zeros == tensor_.numel) {
    for (int64_t r = 0; r < rows; ++r) bits[r / 8] |= 1 << r % 8;
  } else if (pool != nullptr && tensor_.numel * element_size(tensor_.dtype) >= kSerialBytes) {
    pool(tasks, task, &search);
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i, &search);
  }
  const bool found = std::any_of(bits.begin(), bits.end(), [](uint8_t b) { return b != 0; });
  return found ? bits : std::vector<uint8_t>();
}

// Whether rows [begin, end) may have a zero row.
bool ZeroRowFinder::has_zeros(int64_t begin, int64_t end,
                              const std::vector<int64_t>& in_chunks) const {
  if (in_chunks.empty() || stride_ != row_numel_ || !dims_.empty()) return true;
  // What is read as a chunk of whole rows may end in the next chunk.
  const int64_t first = std::max(begin * row_numel_ / kChunk - 1, int64_t{0});
  int64_t zeros = 0;
  for (int64_t c = first; c <= (end * row_numel_ - 1) / kChunk; ++c) zeros += in_chunks[c];
  return zeros >= row_numel_;
}

void ZeroRowFinder::read(int64_t begin, int64_t end, uint8_t* bits) const {
  for (int64_t r = begin; r < end; ++r) {
    if (is_zero(r)) bits[r / 8] |= 1 << r % 8;
  }
}

bool ZeroRowFinder::is_zero(int64_t row) const {
  const int size = element_size(tensor_.dtype);
  const char* data = static_cast<const char*>(tensor_.data) + row * stride_ * size;
  if (dims_.empty()) return cpu::is_zero(data, row_numel_ * size, value_bits_);
  constexpr int64_t kFirst = 16, kNext = 2048;  // most rows have an element that is not zero early
  char elements[kNext * 8];
  for (int64_t i = 0, n = kFirst; i < row_numel_; i += n, n = kNext) {
    n = std::min(n, row_numel_ - i);
    gather(data, dims_, i, n, size, elements);
    if (!cpu::is_zero(elements, n * size, value_bits_)) return false;
  }
  return true;
}

}  // namespace paramstats::cpu
