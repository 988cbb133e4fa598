// The CUDA tensors of one call that the kernels read on one device.
#include "cuda_group.h"

#include <cstring>
#include <string>
#include <utility>

#include "moments.h"
#include "read.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace paramstats {

using torch_abi::api;
using torch_abi::Impl;
using torch_abi::Owned;

namespace {

// Whether a tensor still has the memory of its view. With `fully`, it must also have the same dtype
// and as many elements: then it was read as it is now.
bool has_memory(Impl t, const cuda::TensorView& view, bool fully) {
  const void* data = nullptr;
  return api.torch_get_const_data_ptr(torch_abi::handle(t), &data) == AOTI_TORCH_SUCCESS &&
         data == view.data &&
         (!fully || (torch_abi::numel(t) == view.numel && dtype_of(t) == view.dtype));
}

}  // namespace

CudaGroup::CudaGroup(int32_t device, py::list tensors, bool hold)
    : device_(device), tensors_(std::move(tensors)), hold_(hold) {
  const size_t most = 2 * tensors_.size();
  views_.reserve(most);
  rows_.reserve(most);
  held_.reserve(hold ? most : tensors_.size());
}

void CudaGroup::add(Impl t, const cuda::TensorView& view, size_t row) {
  views_.push_back(view);
  rows_.push_back(static_cast<int64_t>(row));
  if (hold_) {
    held_.push_back(Owned::alias_of(t));
  } else if (row >= tensors_.size()) {
    held_.push_back(Owned::reference_to(t));
  }
}

void CudaGroup::add(const cuda::UpdateView& view, const Operands& operands, size_t row) {
  updates_.push_back(view);
  for (int k = 0; k < kUpdateRows; ++k) {
    if (view.has(static_cast<UpdateRow>(k))) rows_.push_back(static_cast<int64_t>(row) + k);
  }
  for (const auto& [t, memory] : operands) {
    operands_.emplace_back(hold_ ? Owned::alias_of(t) : Owned::reference_to(t), memory);
  }
}

cuda::Inputs CudaGroup::inputs() const {
  return {views_.data(), static_cast<int64_t>(views_.size()), updates_.data(),
          static_cast<int64_t>(updates_.size())};
}

cuda::Sizes CudaGroup::sizes() const { return cuda::sizes(inputs()); }

// Whether each tensor still has the memory of its view. The gradients and operands that the group
// holds are not freed, so no other tensor has their addresses. A tensor that was replaced twice may
// have memory at the same address again. (`fully`: see has_memory.)
bool CudaGroup::is_unchanged(bool fully) const {
  if (hold_) return true;
  const size_t n = tensors_.size();
  size_t gradients = 0;
  for (size_t i = 0; i < views_.size(); ++i) {
    const auto row = static_cast<size_t>(rows_[i]);
    const auto at = static_cast<Py_ssize_t>(row < n ? row : row - n);
    Impl t = torch_abi::impl_of(PyList_GET_ITEM(tensors_.ptr(), at));
    if (row >= n) {
      t = *api.grad(t);
      if (t != held_[gradients++].impl()) return false;
    }
    if (!has_memory(t, views_[i], fully)) return false;
  }
  for (const auto& [tensor, view] : operands_) {
    if (!has_memory(tensor.impl(), view, fully)) return false;
  }
  return true;
}

std::string CudaGroup::enqueue(uintptr_t host, uintptr_t device_memory, uintptr_t stream) {
  replaced_ = replaced_ || !is_unchanged(false);
  if (replaced_) return "";
  std::string error;
  {
    const py::gil_scoped_release release;  // the launch waits while the queue of the device is full
    error = cuda::enqueue(device_, inputs(), reinterpret_cast<void*>(host),
                          reinterpret_cast<void*>(device_memory),
                          reinterpret_cast<cuda::Stream>(stream));
  }
  replaced_ = !is_unchanged(true);
  held_.clear();
  operands_.clear();
  tensors_ = py::list();
  return error;
}

void CudaGroup::write(const py::bytearray& table, uintptr_t host) const {
  const auto* states = reinterpret_cast<const Moments*>(host);
  auto* out = reinterpret_cast<Moments*>(PyByteArray_AS_STRING(table.ptr()));
  const auto n = PyByteArray_GET_SIZE(table.ptr()) / static_cast<int64_t>(sizeof(Moments));
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i] >= n) {
      throw py::index_error("paramstats._native.CudaGroup.write: expected a table of more than " +
                            std::to_string(rows_[i]) + " rows, got " + std::to_string(n));
    }
    std::memcpy(out + rows_[i], states + i, sizeof(Moments));
  }
}

py::dict CudaGroup::details(uintptr_t host) const {
  const auto packed = [](const std::string& bytes) -> py::object {
    if (bytes.empty()) return py::none();
    return py::bytes(bytes);
  };
  py::dict out;
  for (const cuda::Details& found : cuda::details(inputs(), reinterpret_cast<const void*>(host))) {
    out[py::int_(rows_[found.tensor])] =
        py::make_tuple(packed(found.distribution), py::none(), packed(found.zero_rows));
  }
  return out;
}

py::list CudaGroup::aliases() {
  replaced_ = !is_unchanged(true);
  if (replaced_) return py::list();
  const size_t n = tensors_.size();
  std::vector<Owned> kept;  // first all: creating a Python object may run Python code
  kept.reserve(views_.size() + operands_.size());
  size_t held = 0;
  for (size_t i = 0; i < views_.size(); ++i) {
    const int64_t row = rows_[i];
    const bool is_held = hold_ || row >= static_cast<int64_t>(n);
    const Impl t =
        is_held ? held_[held++].impl() : torch_abi::impl_of(PyList_GET_ITEM(tensors_.ptr(), row));
    kept.push_back(Owned::alias_of(t));
  }
  for (const auto& [tensor, view] : operands_) kept.push_back(Owned::alias_of(tensor.impl()));
  py::list objects;
  for (const Owned& tensor : kept) objects.append(tensor.object());
  return objects;
}

}  // namespace paramstats
