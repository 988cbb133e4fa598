// The Python module paramstats._native: reads tensors into tables of Moments, and computes
// statistics from tables. paramstats/_native.pyi documents its functions.
//
// A table is a bytes object of 2 N Moments for N tensors: first the states of the tensors, then
// those of their gradients (count == kAbsent if there is no gradient). Rows of tensors on a GPU are
// unread at first; `Transfer`s fill them in later.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/engine.h"
#include "module_tree.h"
#include "module_walk.h"
#include "moments.h"
#include "tensor_view.h"
#include "thread_pool.h"
#include "torch_abi.h"

namespace py = pybind11;

namespace paramstats {
namespace {

// ---- read tensors into a table ------------------------------------------------------------------

const cpu::Kernels* kernels = cpu::available_kernels().front();

using torch_abi::api;
using torch_abi::Impl;
using torch_abi::Owned;

// The GIL is released during a read if that costs little and helps others. While it is released,
// another thread may drop a gradient or replace the data of a tensor, so that the storage of each
// tensor must be kept alive, which takes about 250 ns. Reads shorter than 3 ms keep the GIL: Python
// itself lets a thread run for 5 ms before it asks for the GIL.
constexpr int64_t kBytesToRelease = 32 << 20;
constexpr int64_t kBytesToReleasePerTensor = 64 << 10;  // the cost is less than 8 % of the read

// The tensors of one call that are on one CUDA device. paramstats/_core/cuda.py starts the read.
struct CudaGroup {
  explicit CudaGroup(int32_t device_index) : device(device_index) {}
  CudaGroup(CudaGroup&&) = default;
  CudaGroup& operator=(CudaGroup&&) = default;

  int32_t device;
  std::vector<cuda::TensorView> views;
  std::vector<int64_t> rows;
  std::vector<Owned> tensors;  // aliases, which keep the memory of the views alive
};

template <class T>
py::bytes bytes_of(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

py::list python_tensors(const CudaGroup& group) {
  py::list tensors(group.tensors.size());
  for (size_t i = 0; i < group.tensors.size(); ++i) tensors[i] = group.tensors[i].object();
  return tensors;
}

// What one call reads, and where it writes the results. Until `run` has returned, no Python code
// may run that could free the memory of a view.
struct Work {
  std::vector<cpu::TensorView> views;
  std::vector<Moments*> out;
  std::vector<Impl> tensors;
  bool with_cuda;
  std::vector<CudaGroup> on_cuda;
  std::vector<std::pair<size_t, Owned>> deferred_rows;  // rows for Python, and their tensors

  Work(size_t rows, bool cuda) : with_cuda(cuda) {
    views.reserve(rows);
    out.reserve(rows);
    tensors.reserve(rows);
  }

  void add(Impl t, Moments* table, size_t row) {
    if (torch_abi::is_plain_cpu(t)) {
      if (const auto view = native_view(t)) {
        views.push_back(*view);
        out.push_back(table + row);
        tensors.push_back(t);
        return;
      }
    } else if (with_cuda && torch_abi::is_plain_cuda(t)) {
      if (const auto view = native_cuda_view(t)) {
        table[row] = view->numel == 0 ? Moments() : unread(view->numel);
        if (view->numel != 0) add_cuda(t, *view, row);
        return;
      }
    }
    defer(t, table, row);
  }

  void add_cuda(Impl t, const cuda::TensorView& view, size_t row) {
    int32_t device = 0;
    api.aoti_torch_get_device_index(torch_abi::handle(t), &device);
    auto group = std::find_if(on_cuda.begin(), on_cuda.end(),
                              [device](const CudaGroup& g) { return g.device == device; });
    if (group == on_cuda.end()) group = on_cuda.emplace(group, device);
    group->views.push_back(view);
    group->rows.push_back(static_cast<int64_t>(row));
    group->tensors.push_back(Owned::alias_of(t));
  }

  // Leaves a row to Python, which reads any kind of tensor.
  void defer(Impl t, Moments* table, size_t row) {
    table[row] = unread(0);
    deferred_rows.emplace_back(row, Owned::reference_to(t));
  }

  void run() {
    const int64_t bytes = cpu::total_bytes(views);
    if (bytes < cpu::kSerialBytes) return cpu::summarize(views, out, *kernels, nullptr);
    const auto n = static_cast<int64_t>(views.size());
    if (bytes < std::max(kBytesToRelease, n * kBytesToReleasePerTensor)) {
      return cpu::summarize(views, out, *kernels, torch_pool);
    }
    std::vector<Owned> kept;
    kept.reserve(tensors.size());
    for (Impl t : tensors) kept.push_back(Owned::alias_of(t));
    cpu::summarize(views, out, *kernels, [](int64_t tasks, cpu::Task task, void* context) {
      const py::gil_scoped_release release;
      torch_pool(tasks, task, context);
    });
  }

  // Empty tuples, the usual result here and for groups, are shared and take no memory.
  py::tuple deferred_for_python() const {
    py::tuple rows(deferred_rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = py::make_tuple(deferred_rows[i].first, deferred_rows[i].second.object());
    }
    return rows;
  }
};

// Whether a tensor may be a lazy parameter: an instance of a subclass without elements. (numel is
// read only of plain tensors: other classes may compute it with Python code.)
bool may_be_lazy(PyObject* object, Impl t) {
  return !torch_abi::is_exact_tensor(object) && torch_abi::is_plain(t) && torch_abi::numel(t) == 0;
}

Impl unpack(PyObject* object) {
  if (!torch_abi::is_tensor(object)) {
    throw py::type_error(std::string("paramstats._native.read: expected a list of tensors, got ") +
                         Py_TYPE(object)->tp_name + " in it");
  }
  return torch_abi::impl_of(object);
}

// tensor.grad if torch would return it without a warning, else null.
Impl gradient_of(Impl t) {
  const Impl grad = *api.grad(t);
  if (grad == api.undefined) return nullptr;
  return api.is_leaf(&t) || api.retains_grad(&t) ? grad : nullptr;
}

py::tuple read(const py::list& tensors, bool params, bool grads, bool cuda) {
  const size_t n = tensors.size();
  auto rows = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(2 * n * sizeof(Moments))));
  if (!rows) throw py::error_already_set();
  auto* table = reinterpret_cast<Moments*>(PyBytes_AS_STRING(rows.ptr()));

  Work work(2 * n, cuda);
  for (size_t i = 0; i < n; ++i) {
    PyObject* object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    const Impl t = unpack(object);
    if (params && !may_be_lazy(object, t)) {
      work.add(t, table, i);
    } else if (!params && torch_abi::is_plain(t)) {
      table[i] = unread(torch_abi::numel(t));
    } else {
      work.defer(t, table, i);
    }
    if (const Impl grad = grads ? gradient_of(t) : nullptr) {
      work.add(grad, table, n + i);
    } else {
      table[n + i] = unread(kAbsent);
    }
  }
  work.run();
  py::tuple groups(work.on_cuda.size());
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = py::cast(std::move(work.on_cuda[i]));
  return py::make_tuple(std::move(rows), work.deferred_for_python(), std::move(groups));
}

// ---- compute statistics from a table -------------------------------------------------------

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

// The statistics of row i of n, divided by the gradient scale if it is a gradient (second half).
Statistics finalize_row(const Moments* rows, size_t i, size_t n, double correction,
                        double grad_scale) {
  return finalize(rows[i], correction, 2 * i >= n ? grad_scale : 1);
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

// ---- select the kernels --------------------------------------------------------------------

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

void set_simd_level(const std::string& name) {
  for (const cpu::Kernels* k : cpu::available_kernels()) {
    if (name == k->name) {
      kernels = k;
      return;
    }
  }
  throw py::value_error("paramstats._native.set_simd_level: expected one of simd_levels(), got '" +
                        name + "'");
}

// ---- connect to torch ----------------------------------------------------------------------

void connect(const py::dict& found) {
  torch_abi::connect(found);
  set_module_class(found["module"]);
}

}  // namespace
}  // namespace paramstats

PYBIND11_MODULE(_native, m) {
  using namespace pybind11::literals;  // NOLINT: needed for the literal _a
  m.doc() = "The native backend of paramstats. Private: import paramstats instead.";
  m.attr("SYMBOLS") = paramstats::torch_abi::symbols();
  m.attr("BLOCK") = paramstats::cpu::kBlock;
  m.attr("CHUNK") = paramstats::cpu::kChunk;
  m.attr("INNER") = paramstats::cpu::kInner;
  m.attr("MAX_SHIFT_SHARE") = paramstats::cpu::kMaxShiftShare;
  m.attr("SERIAL_BYTES") = paramstats::cpu::kSerialBytes;
  m.def("walk", &paramstats::walk, "module"_a, "buffers"_a, "make_layout"_a);
  m.def("cached_layouts", &paramstats::cached_layouts);
  m.def("set_dtensor_class", &paramstats::set_dtensor_class, "type"_a);
  m.attr("CUDA_VIEW_BYTES") = sizeof(paramstats::cuda::TensorView);
  using paramstats::CudaGroup;
  py::class_<CudaGroup>(m, "CudaGroup")
      .def_readonly("device", &CudaGroup::device)
      .def_property_readonly("rows",
                             [](const CudaGroup& g) { return paramstats::bytes_of(g.rows); })
      .def_property_readonly("views",
                             [](const CudaGroup& g) { return paramstats::bytes_of(g.views); })
      .def("tensors", &paramstats::python_tensors);
  m.def("connect", &paramstats::connect, "found"_a);
  m.def("metadata", &paramstats::torch_abi::metadata, "tensor"_a);
  m.def("alias", &paramstats::torch_abi::alias, "tensor"_a);
  m.def("read", &paramstats::read, "tensors"_a, "params"_a, "grads"_a, "cuda"_a = false);
  m.def("merge_rows", &paramstats::merge_rows, "table"_a, "begin"_a, "end"_a);
  m.def("scalars", &paramstats::scalars, "table"_a, "keys"_a, "columns"_a, "correction"_a,
        "grad_scale"_a);
  m.def("finalize_table", &paramstats::finalize_table, "table"_a, "correction"_a, "grad_scale"_a);
  m.def("threads", &paramstats::torch_threads);
  m.def("simd_levels", &paramstats::simd_levels);
  m.def("simd_level", [] { return std::string(paramstats::kernels->name); });
  m.def("set_simd_level", &paramstats::set_simd_level, "name"_a);
}
