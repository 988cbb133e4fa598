// Computes statistics from tables of Moments; _native.pyi documents the functions.
#pragma once

#include <pybind11/pybind11.h>

namespace paramstats {

pybind11::bytes merge_rows(const pybind11::bytes& table, size_t begin, size_t end);

pybind11::dict scalars(const pybind11::bytes& table, const pybind11::bytes& total,
                       const pybind11::dict& keys, const pybind11::bytes& columns,
                       double correction, double grad_scale);

// The class of the results of finalize_row: Statistics in paramstats/_core/moments.py.
void set_statistics_class(const pybind11::type& type);

double statistic(const pybind11::bytes& table, size_t index, size_t column, double correction,
                 double scale);

pybind11::tuple finalize_row(const pybind11::bytes& table, size_t index, double correction,
                             double scale);

pybind11::bytes finalize_table(const pybind11::bytes& table, double correction, double grad_scale);

}  // namespace paramstats
