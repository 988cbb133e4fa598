// The Python module paramstats._native: reads tensors into tables of Moments, and computes
// statistics from tables. paramstats/_native.pyi documents its functions.
//
// A table is a bytes object of 2 N Moments for N tensors: first the states of the tensors, then
// those of their gradients (count == kAbsent if there is no gradient). Rows of tensors on a GPU are
// unread at first; `Transfer`s fill them in later.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/engine.h"
#include "cuda_call.h"
#include "module_tree.h"
#include "module_walk.h"
#include "moments.h"
#include "tensor_view.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace paramstats {
namespace {

// ---- read tensors into a table ------------------------------------------------------------------

const cpu::Kernels* kernels = cpu::available_kernels().front();

// What one call reads, and where it writes the results. Until `run` has returned, no Python code
// may run that could free the memory of a view, unless `keep_memory` was called.
struct Work {
  std::vector<cpu::TensorView> views;
  std::vector<Moments*> out;
  std::vector<const c10::TensorImpl*> tensors;
  CudaCall on_cuda;
  std::vector<c10::Storage> kept_storages;
  std::vector<std::vector<int64_t>> kept_shapes;
  std::vector<std::pair<size_t, at::Tensor>> deferred_rows;  // rows for Python, and their tensors

  explicit Work(size_t rows) {
    views.reserve(rows);
    out.reserve(rows);
    tensors.reserve(rows);
  }

  void add(const at::Tensor& tensor, Moments* table, size_t row) {
    const c10::TensorImpl& t = *tensor.unsafeGetTensorImpl();
    if (is_plain_cpu(t)) {
      if (const auto view = native_view(t)) {
        views.push_back(*view);
        out.push_back(table + row);
        tensors.push_back(&t);
        return;
      }
    } else if (is_plain_cuda(t)) {
      const auto view = native_cuda_view(t);
      if (view && (view->numel == 0 || on_cuda.add(*view, t, row))) {
        table[row] = view->numel == 0 ? Moments() : unread(view->numel);
        return;
      }
    }
    defer(tensor, table, row);
  }

  // Leaves a row to Python, which reads any kind of tensor.
  void defer(const at::Tensor& tensor, Moments* table, size_t row) {
    table[row] = unread(0);
    deferred_rows.emplace_back(row, tensor);
  }

  // Keeps the memory of all views alive. Must be called before the GIL is released: another thread
  // may then drop a gradient or replace the data of a tensor.
  void keep_memory() {
    kept_storages.reserve(tensors.size());
    for (const c10::TensorImpl* t : tensors) kept_storages.push_back(t->storage());
    tensors.clear();
  }

  // Copies sizes and strides. Needed only if the GIL is released before cpu::summarize has read
  // them.
  void keep_shapes() {
    kept_shapes.reserve(2 * views.size());
    for (cpu::TensorView& v : views) {
      kept_shapes.emplace_back(v.sizes, v.sizes + v.ndim);
      v.sizes = kept_shapes.back().data();
      kept_shapes.emplace_back(v.strides, v.strides + v.ndim);
      v.strides = kept_shapes.back().data();
    }
  }

  void run() {
    if (cpu::total_bytes(views) < cpu::kSerialBytes) {
      return cpu::summarize(views, out, *kernels, nullptr);
    }
    keep_memory();
    cpu::summarize(views, out, *kernels, [](int64_t n, cpu::Task task, void* context) {
      const py::gil_scoped_release release;
      torch_pool(n, task, context);
    });
  }

  // Empty tuples, the usual result here and for transfers, are shared and take no memory.
  py::tuple deferred_for_python() const {
    py::tuple rows(deferred_rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = py::make_tuple(deferred_rows[i].first, deferred_rows[i].second);
    }
    return rows;
  }
};

// Whether a tensor may be a lazy parameter: an instance of a subclass without elements. (numel is
// read only of plain tensors: other classes may compute it with Python code.)
bool may_be_lazy(PyObject* object, const c10::TensorImpl& t) {
  return !THPVariable_CheckExact(object) && is_plain(t) && t.numel() == 0;
}

const at::Tensor& unpack(PyObject* object) {
  if (!THPVariable_CheckExact(object) &&
      !PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass))) {
    throw py::type_error(
        std::string("paramstats._native.read: expected a list of tensors, got an ") +
        Py_TYPE(object)->tp_name + " in it");
  }
  return THPVariable_Unpack(object);
}

// tensor.grad if torch would return it without a warning, else an undefined tensor.
const at::Tensor& gradient_of(const at::Tensor& tensor) {
  static const at::Tensor none;
  const at::Tensor& grad = tensor.unsafeGetTensorImpl()->grad();
  return !grad.defined() || tensor.is_leaf() || tensor.retains_grad() ? grad : none;
}

// Starts the reads on all devices. Raises torch's errors, e.g. out of memory, as their Python
// classes.
std::vector<std::shared_ptr<Transfer>> start(CudaCall& call) {
  try {
    return call.start();
  } catch (const c10::Error&) {
    torch::translate_exception_to_python(std::current_exception());
    throw py::error_already_set();
  }
}

py::tuple read(const py::list& tensors, bool params, bool grads) {
  const size_t n = tensors.size();
  auto rows = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(2 * n * sizeof(Moments))));
  if (!rows) throw py::error_already_set();
  auto* table = reinterpret_cast<Moments*>(PyBytes_AS_STRING(rows.ptr()));

  Work work(2 * n);
  for (size_t i = 0; i < n; ++i) {
    PyObject* object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    const at::Tensor& tensor = unpack(object);
    const c10::TensorImpl& t = *tensor.unsafeGetTensorImpl();
    if (params && !may_be_lazy(object, t)) {
      work.add(tensor, table, i);
    } else if (!params && is_plain(t)) {
      table[i] = unread(t.numel());
    } else {
      work.defer(tensor, table, i);
    }
    const at::Tensor* grad = grads ? &gradient_of(tensor) : nullptr;
    if (grad != nullptr && grad->defined()) {
      work.add(*grad, table, n + i);
    } else {
      table[n + i] = unread(kAbsent);
    }
  }
  if (!work.on_cuda.empty()) {
    work.keep_memory();
    work.keep_shapes();
  }
  const auto started = start(work.on_cuda);  // first, so that devices work while the CPU does
  work.run();
  py::tuple transfers(started.size());
  for (size_t i = 0; i < started.size(); ++i) transfers[i] = py::cast(started[i]);
  return py::make_tuple(std::move(rows), work.deferred_for_python(), std::move(transfers));
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

void write_transfer(const Transfer& transfer, const py::bytearray& table) {
  auto* rows = reinterpret_cast<Moments*>(PyByteArray_AS_STRING(table.ptr()));
  transfer.write(rows, PyByteArray_GET_SIZE(table.ptr()) / sizeof(Moments));
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

}  // namespace
}  // namespace paramstats

PYBIND11_MODULE(_native, m) {
  using namespace pybind11::literals;  // NOLINT: needed for the literal _a
  m.doc() = "The native backend of paramstats. Private: import paramstats instead.";
  paramstats::find_module_class();
  m.attr("BLOCK") = paramstats::cpu::kBlock;
  m.attr("CHUNK") = paramstats::cpu::kChunk;
  m.attr("INNER") = paramstats::cpu::kInner;
  m.attr("MAX_SHIFT_SHARE") = paramstats::cpu::kMaxShiftShare;
  m.attr("SERIAL_BYTES") = paramstats::cpu::kSerialBytes;
  m.def("walk", &paramstats::walk, "module"_a, "buffers"_a, "make_layout"_a);
  m.def("cached_layouts", &paramstats::cached_layouts);
  m.def("set_dtensor_class", &paramstats::set_dtensor_class, "type"_a);
  py::class_<paramstats::Transfer, std::shared_ptr<paramstats::Transfer>>(m, "Transfer")
      .def("ready", &paramstats::Transfer::ready)
      .def("write", &paramstats::write_transfer, "table"_a);
  m.def("use_cuda_backend", &paramstats::use_cuda_backend, "api"_a);
  m.def("cuda_error", &paramstats::cuda_error, "device"_a);
  m.def("read", &paramstats::read, "tensors"_a, "params"_a, "grads"_a);
  m.def("merge_rows", &paramstats::merge_rows, "table"_a, "begin"_a, "end"_a);
  m.def("scalars", &paramstats::scalars, "table"_a, "keys"_a, "columns"_a, "correction"_a,
        "grad_scale"_a);
  m.def("finalize_table", &paramstats::finalize_table, "table"_a, "correction"_a, "grad_scale"_a);
  m.def("threads", &paramstats::torch_threads);
  m.def("simd_levels", &paramstats::simd_levels);
  m.def("simd_level", [] { return std::string(paramstats::kernels->name); });
  m.def("set_simd_level", &paramstats::set_simd_level, "name"_a);
}
