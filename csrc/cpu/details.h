// What is read of a tensor in addition to its Moments (../details.h), chunk by chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"
#include "strides.h"

namespace paramstats::cpu {

// The details of one tensor. The caller sets the first two fields and reads the next two.
struct Details {
  bool has_distribution = false;  // whether to read it
  RowState* rows = nullptr;       // where to write the states of the rows, or null

  DistributionHead head;        // of the distribution
  std::vector<int64_t> counts;  // that follow it

  // The functions below are for summarize(). `prepare` must be called before the first chunk is
  // read, and `finish` after the last. Chunks may be read in any order on any threads.
  void prepare(const TensorView&);
  // Reads the pieces of rows whose first elements, in the order of rows, are in [begin, end).
  // Returns their state.
  Moments read_rows(const TensorView&, int64_t begin, int64_t end, const Kernels&);
  // Reads elements [begin, end) in the order of memory; `dims` is null if the tensor is dense.
  // Returns their state.
  Moments read_distribution(const TensorView&, const std::vector<Dim>* dims, int64_t begin,
                            int64_t end, const Kernels&);
  void finish(const TensorView&);

 private:
  std::vector<Dim> row_dims_;     // in the order of rows; empty if that is the order of memory
  std::vector<RowState> pieces_;  // of all rows, if each has several
  std::vector<HigherMoments> moments_;  // of each chunk
};

}  // namespace paramstats::cpu
