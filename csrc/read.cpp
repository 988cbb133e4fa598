// Reads tensors into a table.
#include "read.h"

#include <algorithm>
#include <utility>

#include "cpu/engine.h"
#include "cuda_group.h"
#include "lookahead.h"
#include "moments.h"
#include "tensor_view.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace paramstats {
namespace {

using torch_abi::api;
using torch_abi::Impl;
using torch_abi::Owned;

const cpu::Kernels* kernels = cpu::available_kernels().front();

// The GIL is released during a read if that costs little and helps others. While it is released,
// another thread may drop a gradient or replace the data of a tensor, so that the storage of each
// tensor must be kept alive, which takes about 250 ns. Reads shorter than 3 ms keep the GIL: Python
// itself lets a thread run for 5 ms before it asks for the GIL.
constexpr int64_t kBytesToRelease = 32 << 20;
constexpr int64_t kBytesToReleasePerTensor = 64 << 10;  // the cost is less than 8 % of the read

// The CPU tensors that one call reads.
struct Lists {
  std::vector<cpu::TensorView> views;
  std::vector<Moments*> out;
  std::vector<Impl> tensors;
};

// Their memory is reused from call to call: new memory would cost a page fault for each 4 KiB.
thread_local Lists unused_lists;
constexpr size_t kMaxUnused = 1 << 16;  // tensors

// What one call reads, and where it writes the results. Until `run` has returned, no Python code
// may run that could free the memory of a view.
struct Work : Lists {
  int64_t bytes = 0;
  py::list all;  // of the call
  uint64_t cuda_devices;
  bool hold;
  std::vector<CudaGroup> on_cuda;
  std::vector<std::pair<size_t, Owned>> deferred_rows;  // rows for Python, and their tensors

  Work(const py::list& list, uint64_t devices, bool hold_storages)
      : Lists(std::move(unused_lists)), all(list), cuda_devices(devices), hold(hold_storages) {
    views.clear();
    out.clear();
    tensors.clear();
  }
  ~Work() {
    if (views.capacity() <= kMaxUnused) unused_lists = std::move(*this);
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  void add(Impl t, Moments* table, size_t row) {
    if (torch_abi::is_plain_cpu(t)) {
      if (const auto view = native_view(t)) {
        views.push_back(*view);
        out.push_back(table + row);
        tensors.push_back(t);
        bytes += view->numel * element_size(view->dtype);
        return;
      }
    } else if (cuda_devices != 0 && torch_abi::is_plain_cuda(t)) {
      int32_t device = 0;
      api.aoti_torch_get_device_index(torch_abi::handle(t), &device);
      const bool wanted = device < 64 && (cuda_devices >> device & 1) != 0;
      if (const auto view = wanted ? native_cuda_view(t) : std::nullopt) {
        table[row] = view->numel == 0 ? Moments() : unread(view->numel);
        if (view->numel != 0) group_of(device).add(t, *view, row);
        return;
      }
    }
    defer(t, table, row);
  }

  CudaGroup& group_of(int32_t device) {
    for (CudaGroup& group : on_cuda) {
      if (group.device() == device) return group;
    }
    return on_cuda.emplace_back(device, all, hold);
  }

  // Leaves a row to Python, which reads any kind of tensor.
  void defer(Impl t, Moments* table, size_t row) {
    table[row] = unread(0);
    deferred_rows.emplace_back(row, Owned::reference_to(t));
  }

  void run() {
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

}  // namespace

Impl gradient_of(Impl t) {
  const Impl grad = *api.grad(t);
  if (grad == api.undefined) return nullptr;
  return api.is_leaf(&t) || api.retains_grad(&t) ? grad : nullptr;
}

py::tuple read(const py::list& tensors, bool params, bool grads, uint64_t cuda_devices, bool hold) {
  const size_t n = tensors.size();
  auto rows = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(2 * n * sizeof(Moments))));
  if (!rows) throw py::error_already_set();
  auto* table = reinterpret_cast<Moments*>(PyBytes_AS_STRING(rows.ptr()));

  Work work(tensors, cuda_devices, hold);
  const auto object_at = [list = tensors.ptr()](size_t i) {
    return PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i));
  };
  Lookahead lookahead(n, grads, object_at);
  for (size_t i = 0; i < n; ++i) {
    lookahead.advance(i);
    PyObject* object = object_at(i);
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

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::available_kernels()) names.emplace_back(k->name);
  return names;
}

std::string simd_level() { return kernels->name; }

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

}  // namespace paramstats
