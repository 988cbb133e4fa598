// Computes statistics from tables of Moments.
#include "tables.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/denormals.h"
#include "moments.h"

namespace py = pybind11;

namespace paramstats {
namespace {

const Moments* rows_of(const py::bytes& table, size_t begin, size_t end) {
  const auto size = static_cast<size_t>(PyBytes_GET_SIZE(table.ptr())) / sizeof(Moments);
  if (begin > end || end > size) {
    throw py::index_error("paramstats._native: expected rows of a table of " +
                          std::to_string(size) + " rows, got [" + std::to_string(begin) + ", " +
                          std::to_string(end) + ")");
  }
  return reinterpret_cast<const Moments*>(PyBytes_AS_STRING(table.ptr()));
}

bool is_absent(const Moments& a) { return a.count == kAbsent; }

// The statistics of row i of n, divided by the gradient scale if it is a gradient (second half).
Statistics finalize_row(const Moments* rows, size_t i, size_t n, double correction,
                        double grad_scale) {
  return finalize(rows[i], correction, 2 * i >= n ? grad_scale : 1);
}

}  // namespace

// Merges the rows [begin, end). Skips absent and unread rows, unless no row was read.
py::bytes merge_rows(const py::bytes& table, size_t begin, size_t end) {
  const cpu::WithDenormals with_denormals;
  const Moments* rows = rows_of(table, begin, end);
  Moments all;
  int64_t unread_rows = 0, unread_count = 0, read_rows = 0;
  for (size_t i = begin; i < end; ++i) {
    if (is_absent(rows[i])) continue;
    if (is_unread(rows[i])) {
      ++unread_rows;
      unread_count += rows[i].count;
    } else {
      ++read_rows;
      all = merge(all, rows[i]);
    }
  }
  if (read_rows == 0 && unread_rows > 0) all = unread(unread_count);
  return py::bytes(reinterpret_cast<const char*>(&all), sizeof(all));
}

// Returns {key: statistic}. `keys` contains, row by row, one key per entry of `columns` (positions
// in Statistics). Absent and unread rows also have keys, which are skipped.
py::dict scalars(const py::bytes& table, const py::list& keys, const std::vector<int>& columns,
                 double correction, double grad_scale) {
  const cpu::WithDenormals with_denormals;
  const size_t n = keys.size() / (columns.empty() ? 1 : columns.size());
  const Moments* rows = rows_of(table, 0, n);
  for (int column : columns) {
    if (column < 0 || column >= kStatistics) {
      throw py::index_error("paramstats._native.scalars: expected columns from 0 to " +
                            std::to_string(kStatistics - 1) + ", got " + std::to_string(column));
    }
  }
  py::dict out;
  Py_ssize_t next = 0;
  for (size_t i = 0; i < n; ++i) {
    if (is_unread(rows[i])) {  // absent rows, too
      next += static_cast<Py_ssize_t>(columns.size());
      continue;
    }
    const Statistics all = finalize_row(rows, i, n, correction, grad_scale);
    double values[kStatistics];
    std::memcpy(values, &all, sizeof(all));
    for (int column : columns) {
      const py::float_ value(values[column]);
      if (next >= PyList_GET_SIZE(keys.ptr())) {
        throw py::index_error(
            "paramstats._native.scalars: expected a fixed list, but the keys have changed during "
            "the call");
      }
      const auto key = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(keys.ptr(), next++));
      if (PyDict_SetItem(out.ptr(), key.ptr(), value.ptr()) != 0) throw py::error_already_set();
    }
  }
  return out;
}

// Returns the statistics of every row as float64, in the order of Statistics; NaN for absent rows.
py::bytes finalize_table(const py::bytes& table, double correction, double grad_scale) {
  const cpu::WithDenormals with_denormals;
  const size_t n = PyBytes_GET_SIZE(table.ptr()) / sizeof(Moments);
  const Moments* rows = rows_of(table, 0, n);
  std::vector<Statistics> out(n);
  for (size_t i = 0; i < n; ++i) {
    if (is_absent(rows[i])) {
      auto* values = reinterpret_cast<double*>(&out[i]);
      std::fill(values, values + kStatistics, kNaN);
    } else {
      out[i] = finalize_row(rows, i, n, correction, grad_scale);
    }
  }
  return py::bytes(reinterpret_cast<const char*>(out.data()), n * sizeof(Statistics));
}

}  // namespace paramstats
