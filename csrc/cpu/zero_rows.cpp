// Finds the rows of tensors that are all zero.
#include "zero_rows.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace paramstats::cpu {
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

std::vector<uint8_t> ZeroRowFinder::find(const std::vector<int64_t>& in_chunks, Pool pool) const {
  const int64_t rows = tensor_.rows;
  std::vector<uint8_t> bits(ceil_div(rows, 8));
  struct Search {
    const ZeroRowFinder& finder;
    const std::vector<int64_t>& in_chunks;
    int64_t rows, step;  // of a task; tasks write no byte of another
    uint8_t* bits;
    std::atomic<bool> found;
  } search{*this, in_chunks, rows, 8 * ceil_div(kChunk / 8, row_numel_), bits.data(), false};
  const auto task = [](int64_t i, void* context) {
    Search& s = *static_cast<Search*>(context);
    const int64_t begin = i * s.step, end = std::min(s.rows, begin + s.step);
    if (s.finder.has_zeros(begin, end, s.in_chunks) && s.finder.read(begin, end, s.bits)) {
      s.found.store(true, std::memory_order_relaxed);
    }
  };
  const int64_t tasks = ceil_div(rows, search.step);
  if (pool != nullptr && tensor_.numel * element_size(tensor_.dtype) >= kSerialBytes) {
    pool(tasks, task, &search);
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i, &search);
  }
  return search.found ? bits : std::vector<uint8_t>();
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

bool ZeroRowFinder::read(int64_t begin, int64_t end, uint8_t* bits) const {
  const int64_t bytes = row_numel_ * element_size(tensor_.dtype);
  const bool is_dense = dims_.empty() && stride_ == row_numel_;
  if (is_dense) {
    switch (bytes) {
      case 1: return read_words<uint8_t>(begin, end, bits);
      case 2: return read_words<uint16_t>(begin, end, bits);
      case 4: return read_words<uint32_t>(begin, end, bits);
      case 8: return read_words<uint64_t>(begin, end, bits);
    }
  }
  const auto* x = static_cast<const char*>(tensor_.data);
  bool found = false;
  for (int64_t r = begin; r < end; ++r) {
    if (is_dense && bytes > 8) {  // most rows have an element that is not zero at their begin
      uint64_t word;
      std::memcpy(&word, x + r * bytes, sizeof(word));
      if (word & value_bits_) continue;
    }
    if (!is_zero(r)) continue;
    bits[r / 8] |= 1 << r % 8;
    found = true;
  }
  return found;
}

template <class Word>
bool ZeroRowFinder::read_words(int64_t begin, int64_t end, uint8_t* bits) const {
  const auto* x = static_cast<const Word*>(tensor_.data);
  const auto mask = static_cast<Word>(value_bits_);
  Word words[8];
  uint8_t any = 0;
  const auto add = [&](int64_t r) {
    unsigned byte = 0;
    for (int k = 0; k < 8; ++k) byte |= static_cast<unsigned>((words[k] & mask) == 0) << k;
    bits[r / 8] = static_cast<uint8_t>(byte);
    any |= bits[r / 8];
  };
  int64_t r = begin;
  for (; r + 8 <= end; r += 8) {
    std::memcpy(words, x + r, sizeof(words));
    add(r);
  }
  if (r < end) {
    std::fill_n(words, 8, mask);  // not zero
    std::memcpy(words, x + r, (end - r) * sizeof(Word));
    add(r);
  }
  return any != 0;
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

ZeroRowSearch::ZeroRowSearch(const std::vector<TensorView>& tensors, bool has_strided)
    : tensors_(tensors) {
  if (!has_strided) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].ndim > 0 && tensors[i].rows > 0) strided_.emplace_back(i, tensors[i]);
  }
}

void ZeroRowSearch::add(size_t tensor, const Moments& state, const Moments* chunks, size_t step) {
  const TensorView& t = tensors_[tensor];
  if (t.rows == 0 || state.zeros < t.numel / t.rows || state.zeros == t.numel) return;
  Candidate candidate{tensor, {}};
  if (chunks != nullptr) {
    candidate.in_chunks.resize(ceil_div(t.numel, kChunk));
    for (int64_t& zeros : candidate.in_chunks) {
      zeros = chunks->zeros;
      chunks += step;
    }
  }
  candidates_.push_back(std::move(candidate));
}

void ZeroRowSearch::run(Pool pool, ZeroRows& out) const {
  for (const Candidate& candidate : candidates_) {
    const size_t i = candidate.tensor;
    if (tensors_[i].rows > kMostRows) {
      out.emplace_back(i, std::vector<uint8_t>());
      continue;
    }
    const auto strided =
        std::lower_bound(strided_.begin(), strided_.end(), i,
                         [](const auto& entry, size_t t) { return entry.first < t; });
    const bool is_strided = strided != strided_.end() && strided->first == i;
    const ZeroRowFinder finder = is_strided ? strided->second : ZeroRowFinder(tensors_[i]);
    auto rows = finder.find(candidate.in_chunks, pool);
    if (!rows.empty()) out.emplace_back(i, std::move(rows));
  }
}

}  // namespace paramstats::cpu
