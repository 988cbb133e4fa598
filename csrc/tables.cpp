// Computes statistics from tables of Moments.
#include "tables.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/denormals.h"
#include "moments.h"

namespace py = pybind11;

namespace paramstats {
namespace {

// The states of the tensors of a table, and those of their gradients.
struct Table {
  explicit Table(const py::bytes& bytes)
      : rows(reinterpret_cast<const Moments*>(PyBytes_AS_STRING(bytes.ptr()))),
        size(static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr())) / sizeof(Moments)),
        tensors(size / 2) {}

  bool is_gradient(size_t row) const { return row >= tensors; }

  const Moments* rows;
  size_t size, tensors;
};

bool is_absent(const Moments& a) { return a.count == kAbsent; }

// Merges n rows without absent rows, and without unread rows unless no row was read. Absent if all
// rows are.
Moments merged(const Moments* rows, size_t n) {
  Moments all;
  int64_t unread_rows = 0, unread_count = 0, read_rows = 0;
  for (size_t i = 0; i < n; ++i) {
    if (is_absent(rows[i])) continue;
    if (is_unread(rows[i])) {
      ++unread_rows;
      unread_count += rows[i].count;
    } else {
      ++read_rows;
      all = merge(all, rows[i]);
    }
  }
  if (read_rows > 0) return all;
  return unread(unread_rows > 0 ? unread_count : kAbsent);
}

PyTypeObject* statistics = &PyTuple_Type;

struct Values {
  double of[kStatistics];
};

Values values(const Moments& state, double correction, double scale) {
  const Statistics statistics = finalize(state, correction, scale);
  Values out;
  static_assert(sizeof(out) == sizeof(statistics), "Statistics consists of doubles");
  std::memcpy(&out, &statistics, sizeof(out));
  return out;
}

Values values_of_row(const py::bytes& table, size_t index, double correction, double scale) {
  const cpu::WithDenormals with_denormals;
  const Table t(table);
  if (index >= t.size) {
    throw py::index_error("paramstats._native: expected one of " + std::to_string(t.size) +
                          " rows, got " + std::to_string(index));
  }
  return values(t.rows[index], correction, scale);
}

}  // namespace

void set_statistics_class(const py::type& type) {
  if (!PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()), &PyTuple_Type)) {
    throw py::type_error("paramstats._native: expected a class of tuples for statistics");
  }
  statistics = reinterpret_cast<PyTypeObject*>(py::type(type).release().ptr());
}

py::bytes merge_rows(const py::bytes& table, size_t begin, size_t end) {
  const cpu::WithDenormals with_denormals;
  const Table t(table);
  if (begin > end || end > t.tensors) {
    throw py::index_error("paramstats._native.merge_rows: expected tensors of " +
                          std::to_string(t.tensors) + ", got [" + std::to_string(begin) + ", " +
                          std::to_string(end) + ")");
  }
  Moments out[2] = {Moments(), merged(t.rows + t.tensors + begin, end - begin)};
  if (begin < end) out[0] = merged(t.rows + begin, end - begin);
  return py::bytes(reinterpret_cast<const char*>(out), sizeof(out));
}

py::dict scalars(const py::bytes& table, const py::bytes& total, const py::dict& keys,
                 const py::bytes& columns, double correction, double grad_scale) {
  const cpu::WithDenormals with_denormals;
  const char* const column = PyBytes_AS_STRING(columns.ptr());
  const Py_ssize_t n = PyBytes_GET_SIZE(columns.ptr());
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (column[i] < 0 || column[i] >= kStatistics) {
      throw py::index_error("paramstats._native.scalars: expected columns from 0 to " +
                            std::to_string(kStatistics - 1) + ", got " + std::to_string(column[i]));
    }
  }
  // A copy of a dict with these keys needs no hashing and no growing.
  const auto out = py::reinterpret_steal<py::dict>(PyDict_Copy(keys.ptr()));
  if (!out) throw py::error_already_set();
  const Table tables[] = {Table(table), Table(total)};
  const auto expected = static_cast<Py_ssize_t>(tables[0].size + tables[1].size) * n;
  if (PyDict_GET_SIZE(out.ptr()) != expected) {
    throw py::index_error("paramstats._native.scalars: expected " + std::to_string(expected) +
                          " keys, got " + std::to_string(PyDict_GET_SIZE(out.ptr())));
  }
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *unset = nullptr;
  std::vector<py::object> unread_keys;
  for (const Table& t : tables) {
    for (size_t row = 0; row < t.size; ++row) {
      const bool is_read = !is_unread(t.rows[row]);  // false for absent rows, too
      Values v;
      if (is_read) v = values(t.rows[row], correction, t.is_gradient(row) ? grad_scale : 1);
      for (Py_ssize_t i = 0; i < n; ++i) {
        if (!PyDict_Next(out.ptr(), &position, &key, &unset)) {  // a key with an odd hash
          throw py::index_error("paramstats._native.scalars: expected keys that do not change");
        }
        if (!is_read) {
          unread_keys.push_back(py::reinterpret_borrow<py::object>(key));
          continue;
        }
        const py::float_ value(v.of[static_cast<int>(column[i])]);
        if (PyDict_SetItem(out.ptr(), key, value.ptr()) != 0) throw py::error_already_set();
      }
    }
  }
  for (const py::object& unread_key : unread_keys) {
    if (PyDict_DelItem(out.ptr(), unread_key.ptr()) != 0) throw py::error_already_set();
  }
  return out;
}

double statistic(const py::bytes& table, size_t index, size_t column, double correction,
                 double scale) {
  if (column >= kStatistics) {
    throw py::index_error("paramstats._native.statistic: expected a column from 0 to " +
                          std::to_string(kStatistics - 1) + ", got " + std::to_string(column));
  }
  return values_of_row(table, index, correction, scale).of[column];
}

py::tuple finalize_row(const py::bytes& table, size_t index, double correction, double scale) {
  const Values v = values_of_row(table, index, correction, scale);
  // As tuple.__new__(Statistics, values), without the values in another tuple.
  auto out = py::reinterpret_steal<py::tuple>(statistics->tp_alloc(statistics, kStatistics));
  if (!out) throw py::error_already_set();
  for (int i = 0; i < kStatistics; ++i) {
    PyTuple_SET_ITEM(out.ptr(), i, py::float_(v.of[i]).release().ptr());
  }
  return out;
}

py::bytes finalize_table(const py::bytes& table, double correction, double grad_scale) {
  const cpu::WithDenormals with_denormals;
  const Table t(table);
  std::vector<Values> out(t.size);
  for (size_t row = 0; row < out.size(); ++row) {
    if (is_absent(t.rows[row])) {
      std::fill_n(out[row].of, kStatistics, kNaN);
    } else {
      out[row] = values(t.rows[row], correction, t.is_gradient(row) ? grad_scale : 1);
    }
  }
  return py::bytes(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(Values));
}

}  // namespace paramstats
