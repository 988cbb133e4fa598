// Computes statistics from tables of Moments; _native.pyi documents the functions.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace paramstats {

pybind11::bytes merge_rows(const pybind11::bytes& table, size_t begin, size_t end);

pybind11::dict scalars(const pybind11::bytes& table, const pybind11::list& keys,
                       const std::vector<int>& columns, double correction, double grad_scale);

pybind11::bytes finalize_table(const pybind11::bytes& table, double correction, double grad_scale);

}  // namespace paramstats
