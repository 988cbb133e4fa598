// Reads tensors into a table: a bytes object of 2 N Moments for N tensors, first the states of the
// tensors, then those of their gradients (count == kAbsent if there is no gradient). The rows of
// updates follow.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "torch_abi.h"

namespace paramstats {

// tensor.grad if torch would return it without a warning, else null.
torch_abi::Impl gradient_of(torch_abi::Impl t);

// Returns (table, deferred rows, groups of CUDA tensors, details); see _native.pyi. Rows in groups
// are unread until the group has written them.
pybind11::tuple read(const pybind11::list& tensors, bool params, bool grads, uint64_t cuda_devices,
                     bool hold, const pybind11::tuple& updates, const pybind11::bytes& details);

// The names of the SIMD levels that this CPU supports, fastest first, and the one in use.
std::vector<std::string> simd_levels();
std::string simd_level();
void set_simd_level(const std::string& name);

}  // namespace paramstats
