// Finds the rows of tensors (the indices of dimension 0) that are all zero.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "engine.h"
#include "strides.h"

namespace paramstats::cpu {

// Finds the rows of a tensor that are all zero.
class ZeroRowFinder {
 public:
  explicit ZeroRowFinder(const TensorView&);

  // Sets bit r % 8 of byte r // 8 for each row r that is all zero. `in_chunks` has the number of
  // zeros of each chunk or is empty. Returns no bytes if there is no such row.
  std::vector<uint8_t> find(const std::vector<int64_t>& in_chunks, Pool) const;

 private:
  bool read(int64_t begin, int64_t end, uint8_t* bits) const;  // whether there is any
  template <class Word>
  bool read_words(int64_t begin, int64_t end, uint8_t* bits) const;  // each is a row
  bool is_zero(int64_t row) const;
  bool has_zeros(int64_t begin, int64_t end, const std::vector<int64_t>& in_chunks) const;

  TensorView tensor_;
  int64_t row_numel_, stride_;  // elements
  std::vector<Dim> dims_;       // of a row; empty if it has no gaps
  uint64_t value_bits_;         // of 8 bytes of elements: those that zeros do not have
};

// Finds zero rows once all states are known. A tensor without as many zeros as a row has elements,
// or with zeros only, is not read again, and of others only chunks with so many.
class ZeroRowSearch {
 public:
  // `has_strided`: whether `ndim` of any tensor is not 0.
  ZeroRowSearch(const std::vector<TensorView>&, bool has_strided);
  // Adds a tensor whose state has zeros, in the order of the tensors or not. `chunks` are the
  // states of its chunks, every `step` one of the array; null if they are not known.
  void add(size_t tensor, const Moments& state, const Moments* chunks = nullptr, size_t step = 0);
  void run(Pool, ZeroRows&) const;

 private:
  struct Candidate {
    size_t tensor;
    std::vector<int64_t> in_chunks;
  };

  const std::vector<TensorView>& tensors_;
  std::vector<std::pair<size_t, ZeroRowFinder>> strided_;  // sizes may not be used later
  std::vector<Candidate> candidates_;
};

}  // namespace paramstats::cpu
