// What one call of `read` reads.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/details.h"
#include "cpu/engine.h"
#include "cuda_group.h"
#include "moments.h"
#include "tensor_view.h"
#include "thread_pool.h"
#include "torch_abi.h"
#include "update_arguments.h"

namespace paramstats {

extern const cpu::Kernels* kernels;  // of the SIMD level in use

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
  std::vector<torch_abi::Impl> tensors;  // of the views, then the other operands of updates
};

// Their memory is reused from call to call: new memory would cost a page fault for each 4 KiB.
inline thread_local Lists unused_lists;
constexpr size_t kMaxUnused = 1 << 16;  // tensors

// Whether a tensor may be a lazy parameter: an instance of a subclass without elements. (numel is
// read only of plain tensors: other classes may compute it with Python code.)
inline bool may_be_lazy(PyObject* object, torch_abi::Impl t) {
  return !torch_abi::is_exact_tensor(object) && torch_abi::is_plain(t) && torch_abi::numel(t) == 0;
}

// The details of a tensor on the CPU, and where they are written.
struct PackedDetails {
  size_t row;
  pybind11::object rows = {};  // bytes, or none
  cpu::Details details = {};
};

// What one call reads, and where it writes the results. Until `run` has returned, no Python code
// may run that could free the memory of a view.
struct Work : Lists {
  int64_t bytes = 0;
  pybind11::list all;  // of the call
  uint64_t cuda_devices;
  bool hold;
  std::vector<CudaGroup> on_cuda;
  std::vector<std::pair<size_t, torch_abi::Owned>> deferred_rows;  // for Python, with their tensors
  std::vector<cpu::Update> updates;
  std::vector<std::unique_ptr<PackedDetails>> details;
  cpu::ZeroRows zero_rows;

  Work(const pybind11::list& list, uint64_t devices, bool hold_storages)
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

  // `flags`: the details to read (kReadDistribution, kReadRows, kNoZeroRows).
  void add(torch_abi::Impl t, Moments* table, size_t row, uint8_t flags = 0) {
    if (torch_abi::is_plain_cpu(t)) {
      if (const auto view = native_view(t)) {
        views.push_back(*view);
        if (flags != 0) views.back().details = add_details(*view, row, flags);
        if ((flags & (kNoZeroRows | kReadRows)) == kNoZeroRows) views.back().rows = 0;
        out.push_back(table + row);
        tensors.push_back(t);
        bytes += view->numel * element_size(view->dtype);
        return;
      }
    } else if (cuda_devices != 0 && (flags & kReadRows) == 0 && torch_abi::is_plain_cuda(t)) {
      int32_t device = 0;
      if (auto view = is_wanted(t, &device) ? native_cuda_view(t) : std::nullopt;
          view && (flags == 0 || view->numel > 0)) {
        view->details = flags;
        if ((flags & kNoZeroRows) != 0) view->size0 = 0;
        table[row] = view->numel == 0 ? Moments() : unread(view->numel);
        if (view->numel != 0) group_of(device).add(t, *view, row);
        return;
      }
    }
    defer(t, table, row);
  }

  cpu::Details* add_details(const cpu::TensorView&, size_t row, uint8_t flags);

  // The details by row of the table, as `read` returns them.
  pybind11::object details_for_python(const Moments* table) const;

  // Whether the kernels may read the device of a CUDA tensor.
  bool is_wanted(torch_abi::Impl t, int32_t* device) const {
    torch_abi::api.aoti_torch_get_device_index(torch_abi::handle(t), device);
    return *device < 64 && (cuda_devices >> *device & 1) != 0;
  }

  CudaGroup& group_of(int32_t device) {
    for (CudaGroup& group : on_cuda) {
      if (group.device() == device) return group;
    }
    return on_cuda.emplace_back(device, all, hold);
  }

  // Leaves a row to Python, which reads any kind of tensor.
  void defer(torch_abi::Impl t, Moments* table, size_t row) {
    table[row] = unread(0);
    deferred_rows.emplace_back(row, torch_abi::Owned::reference_to(t));
  }

  // Adds the updates of the call, after all its tensors (work_updates.cpp).
  void add_updates(const std::vector<UpdateArguments>& all_updates, Moments* table);

  void run() {
    if (bytes < cpu::kSerialBytes)
      return cpu::summarize(views, out, *kernels, nullptr, updates, &zero_rows);
    const auto n = static_cast<int64_t>(views.size());
    if (bytes < std::max(kBytesToRelease, n * kBytesToReleasePerTensor)) {
      return cpu::summarize(views, out, *kernels, torch_pool, updates, &zero_rows);
    }
    std::vector<torch_abi::Owned> kept;
    kept.reserve(tensors.size());
    for (torch_abi::Impl t : tensors) kept.push_back(torch_abi::Owned::alias_of(t));
    const auto pool = [](int64_t tasks, cpu::Task task, void* context) {
      const pybind11::gil_scoped_release release;
      torch_pool(tasks, task, context);
    };
    cpu::summarize(views, out, *kernels, pool, updates, &zero_rows);
  }

  // Empty tuples, the usual result here and for groups, are shared and take no memory.
  pybind11::tuple deferred_for_python() const {
    pybind11::tuple rows(deferred_rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i] = pybind11::make_tuple(deferred_rows[i].first, deferred_rows[i].second.object());
    }
    return rows;
  }

 private:
  struct Operands;

  bool add_update(const UpdateArguments&, const std::vector<size_t>& positions, Moments* table,
                  size_t row);
  bool add_cuda_update(const UpdateArguments&, Operands&, Moments* table, size_t row);
  torch_abi::Impl tensor_at(size_t row) const;
  bool is_lazy(size_t row) const;
};

}  // namespace paramstats
