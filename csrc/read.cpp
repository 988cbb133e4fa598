// Reads tensors into a table.
#include "read.h"

#include <algorithm>
#include <utility>

#include "cpu/engine.h"
#include "cpu/strides.h"
#include "cuda_group.h"
#include "lookahead.h"
#include "moments.h"
#include "tensor_view.h"
#include "thread_pool.h"
#include "update_arguments.h"

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
  std::vector<Impl> tensors;  // of the views, then the other operands of updates
};

// Their memory is reused from call to call: new memory would cost a page fault for each 4 KiB.
thread_local Lists unused_lists;
constexpr size_t kMaxUnused = 1 << 16;  // tensors

// Whether a tensor may be a lazy parameter: an instance of a subclass without elements. (numel is
// read only of plain tensors: other classes may compute it with Python code.)
bool may_be_lazy(PyObject* object, Impl t) {
  return !torch_abi::is_exact_tensor(object) && torch_abi::is_plain(t) && torch_abi::numel(t) == 0;
}

// What one call reads, and where it writes the results. Until `run` has returned, no Python code
// may run that could free the memory of a view.
struct Work : Lists {
  int64_t bytes = 0;
  py::list all;  // of the call
  uint64_t cuda_devices;
  bool hold;
  std::vector<CudaGroup> on_cuda;
  std::vector<std::pair<size_t, Owned>> deferred_rows;  // rows for Python, and their tensors
  std::vector<cpu::Update> updates;

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

  // Adds the updates of the call, after all its tensors.
  void add_updates(const std::vector<UpdateArguments>& all_updates, Moments* table) {
    const size_t n = all.size();
    std::vector<size_t> positions(2 * n, cpu::kNoTensor);  // of the rows' views
    for (size_t i = 0; i < out.size(); ++i) positions[out[i] - table] = i;
    for (size_t u = 0; u < all_updates.size(); ++u) {
      const UpdateArguments& arguments = all_updates[u];
      Moments* const rows = table + 2 * n + kUpdateRows * u;
      if (add_update(arguments, positions, rows)) continue;
      std::fill_n(rows, kUpdateRows, unread(0));
      deferred_rows.emplace_back(rows - table, Owned::reference_to(tensor_at(arguments.param)));
    }
  }

  // Returns false if Python must read the update.
  bool add_update(const UpdateArguments& arguments, const std::vector<size_t>& positions,
                  Moments* rows) {
    Operands operands{*this, positions};
    cpu::UpdateOperands& u = operands.update.operands;
    const bool added =
        operands.add(arguments.param, 0, u.param) && operands.add(arguments.grad, 1, u.grad) &&
        operands.add(arguments.momentum, 2, u.momentum) &&
        operands.add(arguments.variance, 3, u.variance) && operands.add(arguments.old, u.old);
    const auto step = operands.step(arguments);
    if (!added || !step) return false;
    u.method = arguments.method;
    u.in_float = step_constants<float>(arguments.hyperparameters, *step);
    u.in_double = step_constants<double>(arguments.hyperparameters, *step);
    operands.update.rows = rows;
    updates.push_back(operands.update);
    return true;
  }

  // The tensor of a row; null if there is no such gradient.
  Impl tensor_at(size_t row) const {
    const size_t n = all.size();
    const auto i = static_cast<Py_ssize_t>(row < n ? row : row - n);
    const Impl t = torch_abi::impl_of(PyList_GET_ITEM(all.ptr(), i));
    return row < n ? t : gradient_of(t);
  }

  bool is_lazy(size_t row) const {
    if (row >= all.size()) return false;
    PyObject* object = PyList_GET_ITEM(all.ptr(), static_cast<Py_ssize_t>(row));
    return may_be_lazy(object, torch_abi::impl_of(object));
  }

  // Collects the operands of one update.
  struct Operands {
    Work& work;
    const std::vector<size_t>& positions;
    cpu::Update update = {{}, 0, {kNone, kNone, kNone, kNone}, nullptr};
    std::optional<cpu::TensorView> first = {};
    static constexpr size_t kNone = cpu::kNoTensor;

    // Adds the tensor of a row, which may be missing. Returns false if the kernels cannot read it.
    bool add(size_t row, size_t index, cpu::Operand& operand) {
      if (row == kNoRow) return true;
      update.tensors[index] = positions[row];
      if (positions[row] != kNone) return add_view(work.views[positions[row]], operand);
      if (work.is_lazy(row)) return false;
      return add(work.tensor_at(row), operand);
    }
    bool add(Impl t, cpu::Operand& operand) {
      if (t == nullptr) return true;
      if (!torch_abi::is_plain_cpu(t)) return false;
      const auto view = native_view(t);
      if (!view || !add_view(*view, operand)) return false;
      work.tensors.push_back(t);
      work.bytes += view->numel * element_size(view->dtype);
      return true;
    }
    bool add_view(const cpu::TensorView& view, cpu::Operand& operand) {
      if (view.dtype > DType::kFloat16) return false;
      if (!first) {
        first = view;
        update.numel = view.numel;
        if (view.ndim > 0 && !cpu::is_dense(cpu::memory_order(view))) return false;
      }
      static constexpr char kEmpty = 0;
      operand = {view.numel == 0 ? &kEmpty : view.data, view.dtype};
      return cpu::have_same_layout(*first, view);
    }

    // The step, if it is known on the CPU.
    std::optional<double> step(const UpdateArguments& arguments) const {
      if (arguments.step_row == kNoRow) return arguments.step;
      const Impl t = work.tensor_at(arguments.step_row);
      if (t == nullptr || !torch_abi::is_plain_cpu(t)) return std::nullopt;
      const auto view = native_view(t);
      if (!view || view->numel != 1) return std::nullopt;
      const Moments state = kernels->chunk[static_cast<int>(view->dtype)](view->data, 1);
      return finite_count(state) == 1 ? state.mean : kNaN;
    }
  };

  void run() {
    if (bytes < cpu::kSerialBytes) return cpu::summarize(views, out, *kernels, nullptr, updates);
    const auto n = static_cast<int64_t>(views.size());
    if (bytes < std::max(kBytesToRelease, n * kBytesToReleasePerTensor)) {
      return cpu::summarize(views, out, *kernels, torch_pool, updates);
    }
    std::vector<Owned> kept;
    kept.reserve(tensors.size());
    for (Impl t : tensors) kept.push_back(Owned::alias_of(t));
    const auto pool = [](int64_t tasks, cpu::Task task, void* context) {
      const py::gil_scoped_release release;
      torch_pool(tasks, task, context);
    };
    cpu::summarize(views, out, *kernels, pool, updates);
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

py::tuple read(const py::list& tensors, bool params, bool grads, uint64_t cuda_devices, bool hold,
               const py::tuple& updates) {
  const size_t n = tensors.size();
  const size_t n_rows = 2 * n + kUpdateRows * updates.size();
  const std::vector<UpdateArguments> update_list = update_arguments(updates, n);
  auto rows = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(n_rows * sizeof(Moments))));
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
  if (!update_list.empty()) work.add_updates(update_list, table);
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
