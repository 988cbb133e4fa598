// The updates that `read` gets from Python: the tuples Update of paramstats/_core/updates.py.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "torch_abi.h"
#include "updates.h"

namespace paramstats {

constexpr size_t kNoRow = SIZE_MAX;

struct UpdateArguments {
  // Rows of the table, or kNoRow; all but `grad` are rows of tensors, which are there.
  // `step_row` is that of a tensor with one element.
  size_t param, grad, momentum, variance, step_row;
  torch_abi::Impl old;  // null unless the method is kDifference
  UpdateMethod method;
  Hyperparameters hyperparameters;
  double step;
};

// Checks and converts the tuples of a call with n tensors. The tuples keep the tensors `old` alive.
// Throws errors of Python.
std::vector<UpdateArguments> update_arguments(const pybind11::tuple& updates, size_t n);

}  // namespace paramstats
