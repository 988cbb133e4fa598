// Adds updates to the work of a call.
#include <algorithm>
#include <optional>
#include <utility>

#include "cpu/strides.h"
#include "read.h"
#include "work.h"

namespace paramstats {

using torch_abi::Impl;
using torch_abi::Owned;

// Collects the operands of one update.
struct Work::Operands {
  Work& work;
  const std::vector<size_t>& positions;
  cpu::Update update = {{}, 0, {kNone, kNone, kNone, kNone}, nullptr};
  std::optional<cpu::TensorView> first = {};
  int32_t device = -1;  // of all operands; -1: the CPU
  std::vector<std::pair<Impl, cuda::TensorView>> on_device = {};
  static constexpr size_t kNone = cpu::kNoTensor;

  // Adds the tensor of a row, which may be missing. Returns false if the kernels cannot read it.
  bool add(size_t row, size_t index, cpu::Operand& operand) {
    if (row == kNoRow) return true;
    update.tensors[index] = positions[row];
    if (positions[row] != kNone) {  // read on the CPU
      return device < 0 && add_view(work.views[positions[row]], operand);
    }
    if (work.is_lazy(row)) return false;
    return add(work.tensor_at(row), operand);
  }
  bool add(Impl t, cpu::Operand& operand) {
    if (t == nullptr) return true;
    if (device >= 0) return add_on_device(t, operand);
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

  bool add_on_device(Impl t, cpu::Operand& operand) {
    const auto view = view_on_device(t);
    return view && add_view(*view, operand);
  }

  // The memory of a tensor on the device, which the call will use.
  std::optional<cpu::TensorView> view_on_device(Impl t) {
    int32_t other = -1;
    if (!torch_abi::is_plain_cuda(t) || !work.is_wanted(t, &other) || other != device) {
      return std::nullopt;
    }
    const auto view = native_view(t);
    if (!view || reinterpret_cast<uintptr_t>(view->data) % element_size(view->dtype) != 0) {
      return std::nullopt;
    }
    on_device.emplace_back(t, cuda::TensorView{view->data, view->numel, view->dtype});
    return view;
  }

  // Adds a tensor on the device that has the step.
  bool add_step(Impl t, cuda::Array& step) {
    const auto view = view_on_device(t);
    if (!view || view->numel != 1) return false;
    step = {view->data, view->dtype};
    return true;
  }

  // The step, if it is known on the CPU.
  std::optional<double> step(const UpdateArguments& arguments) const {
    if (arguments.step_row == kNoRow) return arguments.step;
    const Impl t = work.tensor_at(arguments.step_row);
    if (!torch_abi::is_plain_cpu(t)) return std::nullopt;
    const auto view = native_view(t);
    if (!view || view->numel != 1) return std::nullopt;
    const Moments state = kernels->chunk[static_cast<int>(view->dtype)](view->data, 1);
    return finite_count(state) == 1 ? state.mean : kNaN;
  }
};

// The tensor of a row; null if there is no such gradient.
Impl Work::tensor_at(size_t row) const {
  const size_t n = all.size();
  const auto i = static_cast<Py_ssize_t>(row < n ? row : row - n);
  const Impl t = torch_abi::impl_of(PyList_GET_ITEM(all.ptr(), i));
  return row < n ? t : gradient_of(t);
}

bool Work::is_lazy(size_t row) const {
  if (row >= all.size()) return false;
  PyObject* object = PyList_GET_ITEM(all.ptr(), static_cast<Py_ssize_t>(row));
  return may_be_lazy(object, torch_abi::impl_of(object));
}

// Adds the updates of the call, after all its tensors.
void Work::add_updates(const std::vector<UpdateArguments>& all_updates, Moments* table) {
  const size_t n = all.size();
  std::vector<size_t> positions(2 * n, cpu::kNoTensor);  // of the rows' views
  for (size_t i = 0; i < out.size(); ++i) positions[out[i] - table] = i;
  for (size_t u = 0; u < all_updates.size(); ++u) {
    const UpdateArguments& arguments = all_updates[u];
    const size_t row = 2 * n + kUpdateRows * u;
    if (add_update(arguments, positions, table, row)) continue;
    std::fill_n(table + row, kUpdateRows, unread(0));
    deferred_rows.emplace_back(row, Owned::reference_to(tensor_at(arguments.param)));
  }
}

// Returns false if Python must read the update.
bool Work::add_update(const UpdateArguments& arguments, const std::vector<size_t>& positions,
                      Moments* table, size_t row) {
  const Impl param = tensor_at(arguments.param);
  Operands operands{*this, positions};
  if (torch_abi::is_plain_cuda(param) && !is_wanted(param, &operands.device)) return false;
  cpu::UpdateOperands& u = operands.update.operands;
  const bool added =
      operands.add(arguments.param, 0, u.param) && operands.add(arguments.grad, 1, u.grad) &&
      operands.add(arguments.momentum, 2, u.momentum) &&
      operands.add(arguments.variance, 3, u.variance) && operands.add(arguments.old, u.old);
  if (!added) return false;
  if (operands.device >= 0) return add_cuda_update(arguments, operands, table, row);
  const auto step = operands.step(arguments);
  if (!step) return false;
  u.method = arguments.method;
  u.in_float = step_constants<float>(arguments.hyperparameters, *step);
  u.in_double = step_constants<double>(arguments.hyperparameters, *step);
  operands.update.rows = table + row;
  updates.push_back(operands.update);
  return true;
}

// Adds an update on a CUDA device. Its rows are unread until the group has written them.
bool Work::add_cuda_update(const UpdateArguments& arguments, Operands& operands, Moments* table,
                           size_t row) {
  const cpu::UpdateOperands& u = operands.update.operands;
  const auto step = operands.step(arguments);
  cuda::UpdateView view{};
  if (!step && !operands.add_step(tensor_at(arguments.step_row), view.step_tensor)) return false;
  const cpu::Operand* in_order[] = {&u.param, &u.grad, &u.momentum, &u.variance, &u.old};
  for (int k = 0; k < cuda::kOperands; ++k) {
    view.operands[k] = {in_order[k]->data, in_order[k]->dtype};
  }
  view.method = arguments.method;
  view.numel = operands.update.numel;
  view.hyperparameters = arguments.hyperparameters;
  view.step = step.value_or(kNaN);
  for (int k = 0; k < kUpdateRows; ++k) {
    const bool is_there = view.has(static_cast<UpdateRow>(k));
    table[row + k] = !is_there ? unread(kAbsent) : view.numel == 0 ? Moments() : unread(view.numel);
  }
  if (view.numel != 0) group_of(operands.device).add(view, operands.on_device, row);
  return true;
}

}  // namespace paramstats
