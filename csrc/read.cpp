// Reads tensors into a table.
#include "read.h"

#include "cpu/engine.h"
#include "lookahead.h"
#include "moments.h"
#include "update_arguments.h"
#include "work.h"

namespace py = pybind11;

namespace paramstats {

const cpu::Kernels* kernels = cpu::available_kernels().front();

namespace {

using torch_abi::api;
using torch_abi::Impl;

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
               const py::tuple& updates, const py::bytes& details) {
  const size_t n = tensors.size();
  const auto n_flags = static_cast<size_t>(PyBytes_GET_SIZE(details.ptr()));
  const char* const flags_of = n_flags == 0 ? nullptr : PyBytes_AS_STRING(details.ptr());
  if (n_flags != 0 && n_flags != n) {
    throw py::value_error("paramstats._native.read: expected a byte of details for each of " +
                          std::to_string(n) + " tensors, got " + std::to_string(n_flags));
  }
  constexpr uint8_t kAll = kReadDistribution | kReadRows | kNoZeroRows;
  for (size_t i = 0; i < n_flags; ++i) {
    if ((flags_of[i] & ~kAll) == 0) continue;
    throw py::value_error("paramstats._native.read: expected details of at most " +
                          std::to_string(kAll) + ", got " +
                          std::to_string(static_cast<uint8_t>(flags_of[i])));
  }
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
    const auto flags = static_cast<uint8_t>(flags_of ? flags_of[i] : 0);
    if (params && !may_be_lazy(object, t)) {
      work.add(t, table, i, flags);
    } else if (!params && torch_abi::is_plain(t)) {
      table[i] = unread(torch_abi::numel(t));
    } else {
      work.defer(t, table, i);
    }
    if (const Impl grad = grads ? gradient_of(t) : nullptr) {
      work.add(grad, table, n + i, flags);
    } else {
      table[n + i] = unread(kAbsent);
    }
  }
  if (!update_list.empty()) work.add_updates(update_list, table);
  work.run();
  py::tuple groups(work.on_cuda.size());
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = py::cast(std::move(work.on_cuda[i]));
  return py::make_tuple(std::move(rows), work.deferred_for_python(), std::move(groups),
                        work.details_for_python(table));
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
