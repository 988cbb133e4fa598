// The operators of the fake device. An operator without an own implementation here runs its CPU
// kernel on CPU tensors that share the memory of the CUDA tensors (`fallback`).
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <set>

#include "fake_device.h"

namespace fake_device {
namespace {

using c10::Device;
using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;

// The CPU tensors that stand for the CUDA tensors of one call.
class Aliases {
 public:
  c10::Storage to_cpu(const c10::Storage& storage) {
    if (!storage || storage.device_type() != c10::kCUDA) return storage;
    for (const auto& [cpu, original] : storages_) {
      if (original.is_alias_of(storage)) return cpu;
    }
    c10::DataPtr memory(const_cast<void*>(storage.data()), Device(c10::kCPU));
    c10::Storage cpu(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory),
                     c10::GetAllocator(c10::kCPU), true);
    return storages_.emplace_back(cpu, storage).first;
  }

  at::Tensor to_cpu(const at::Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      unchanged_.insert(t.unsafeGetTensorImpl());
      return t;
    }
    if (!device_) device_ = t.device();
    for (const auto& [cpu, original] : tensors_) {
      if (original.is_same(t)) return cpu;
    }
    at::Tensor cpu = t.is_sparse() ? sparse(to_cpu(impl_of(t).indices()),
                                            to_cpu(impl_of(t).values()), t, DispatchKey::SparseCPU)
                                   : strided(to_cpu(t.storage()), t, DispatchKey::CPU);
    tensors_.emplace_back(cpu, t);
    return cpu;
  }

  at::Tensor to_cuda(const at::Tensor& t) {
    if (!t.defined() || unchanged_.count(t.unsafeGetTensorImpl())) return t;
    for (const auto& [cpu, original] : tensors_) {
      if (cpu.is_same(t)) return original;
    }
    if (t.is_sparse()) {
      return sparse(to_cuda(impl_of(t).indices()), to_cuda(impl_of(t).values()), t,
                    DispatchKey::SparseCUDA);
    }
    const c10::Storage storage = to_cuda(t.storage());
    for (const auto& [cpu, original] : tensors_) {
      if (!cpu.is_sparse() && storage.is_alias_of(original.storage())) {
        return like(
            t, at::detail::make_tensor<c10::TensorImpl>(
                   c10::TensorImpl::VIEW, c10::Storage(storage), original.key_set(), t.dtype()));
      }
    }
    return strided(storage, t, DispatchKey::CUDA);
  }

  // Gives the CUDA tensors the sizes and the memory that an operator gave their CPU tensors.
  void update() {
    for (const auto& [cpu, original] : tensors_) {
      if (cpu.is_sparse()) continue;
      c10::TensorImpl* impl = original.unsafeGetTensorImpl();
      c10::Storage storage = to_cuda(cpu.storage());
      if (!storage.is_alias_of(original.storage())) impl->set_storage_keep_dtype(storage);
      if (storage.data() != cpu.storage().data()) {
        storage.set_data_ptr_noswap(as_device_memory(cpu.storage(), *device_));
        storage.set_nbytes(cpu.storage().nbytes());
      }
      if (cpu.sizes() != original.sizes() || cpu.strides() != original.strides()) {
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides());
      }
      impl->set_storage_offset(cpu.storage_offset());
    }
  }

  void set_device(Device device) { device_ = device.has_index() ? device : cuda(current_device); }

 private:
  c10::Storage to_cuda(const c10::Storage& storage) {
    for (const auto& [cpu, original] : storages_) {
      if (cpu.is_alias_of(storage)) return original;
    }
    c10::Storage made(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      as_device_memory(storage, device_.value_or(cuda(current_device))),
                      device_allocator(), true);
    return storages_.emplace_back(storage, made).second;
  }

  static at::Tensor strided(c10::Storage storage, const at::Tensor& t, DispatchKey key) {
    return like(t, at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                            c10::DispatchKeySet(key), t.dtype()));
  }

  // Gives a new tensor the sizes and the flags of another one.
  static at::Tensor like(const at::Tensor& t, at::Tensor made) {
    c10::TensorImpl* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    impl->_set_conj(t.is_conj());
    impl->_set_neg(t.is_neg());
    return made;
  }

  static at::SparseTensorImpl& impl_of(const at::Tensor& sparse) {
    return *static_cast<at::SparseTensorImpl*>(sparse.unsafeGetTensorImpl());
  }

  static at::Tensor sparse(const at::Tensor& indices, const at::Tensor& values, const at::Tensor& t,
                           DispatchKey key) {
    auto made = at::detail::make_tensor<at::SparseTensorImpl>(c10::DispatchKeySet(key), t.dtype());
    at::SparseTensorImpl &impl = impl_of(made), &from = impl_of(t);
    impl.resize_(from.sparse_dim(), from.dense_dim(), t.sizes());
    impl.set_indices_and_values_unsafe(indices, values);
    impl.set_coalesced(from.coalesced());
    return made;
  }

  std::optional<Device> device_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::set<c10::TensorImpl*> unchanged_;
};

// Applies a function to all tensors of a value, also those in lists.
template <class Function>
IValue map_tensors(const IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& t : value.toTensorVector()) mapped.push_back(function(t));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector()) {
      mapped.push_back(t ? std::optional(function(*t)) : std::nullopt);
    }
    return mapped;
  }
  return value;
}

// Runs the CPU kernel of an operator on aliases of its arguments, and returns its results.
Stack run_on_cpu(const c10::OperatorHandle& op, const Stack& arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  Aliases aliases;
  Stack stack;
  for (const IValue& value : arguments) {
    if (value.isDevice() && value.toDevice().is_cuda()) {
      aliases.set_device(value.toDevice());
      stack.emplace_back(Device(c10::kCPU));
    } else if (value.isStorage()) {
      stack.emplace_back(aliases.to_cpu(value.toStorage()));
    } else {
      stack.push_back(map_tensors(value, [&](const at::Tensor& t) { return aliases.to_cpu(t); }));
    }
  }
  op.callBoxed(&stack);
  aliases.update();
  for (IValue& value : stack) {
    value = map_tensors(value, [&](const at::Tensor& t) { return aliases.to_cuda(t); });
  }
  return stack;
}

// ---- graphs --------------------------------------------------------------------------------

struct Recorded {
  c10::OperatorHandle op;
  Stack arguments, results;
};

Graph::Calls* capture = nullptr;  // of the graph that is being captured

}  // namespace

struct Graph::Calls {
  std::vector<Recorded> list;
};

Graph::Graph() : calls_(std::make_shared<Calls>()) {}

void Graph::begin() {
  capture = calls_.get();
  current().capturing = true;
  set_capturing(current().handle, true);
}

void Graph::end() {
  capture = nullptr;
  current().capturing = false;
  set_capturing(current().handle, false);
}

void Graph::replay() const {
  for (const Recorded& call : calls_->list) {
    const Stack results = run_on_cpu(call.op, call.arguments);
    for (size_t i = 0; i < results.size(); ++i) {
      if (!results[i].isTensor()) continue;
      const at::Tensor& recorded = call.results[i].toTensor();
      if (!results[i].toTensor().is_alias_of(recorded)) recorded.copy_(results[i].toTensor());
    }
  }
}

namespace {

// ---- the fallback --------------------------------------------------------------------------

// Waits or not as torch's operators do on a GPU, and writes the log of the profiler.
void imitate_cuda(const std::string& name, const Stack& arguments) {
  static const std::set<std::string> waiting = {
      "aten::_local_scalar_dense", "aten::nonzero",       "aten::equal",
      "aten::is_nonzero",          "aten::masked_select", "aten::_unique2"};
  const c10::Stream stream = stream_of(current_device);
  if (name == "aten::copy_") {
    const at::Tensor &to = arguments[0].toTensor(), &from = arguments[1].toTensor();
    if (to.device() != from.device()) {
      log("cuda_runtime", "cudaMemcpyAsync", "gpu_memcpy", "Memcpy");
      if (!arguments[2].toBool()) wait_for(stream, "copy_");
      return;
    }
  }
  if (waiting.count(name) != 0) {
    log("cuda_runtime", "cudaMemcpyAsync", "gpu_memcpy", "Memcpy DtoH");
    wait_for(stream, name.c_str());
  } else {
    log("cuda_runtime", "cudaLaunchKernel", "kernel", name);
  }
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  raise_if_failed();
  const auto& schema = op.schema();
  Stack arguments = torch::jit::pop(*stack, schema.arguments().size());
  const bool makes_or_views = schema.name().find("empty") != std::string::npos ||
                              schema.name().find("view") != std::string::npos ||
                              schema.name().find("as_strided") != std::string::npos;
  if (!makes_or_views) {
    imitate_cuda(schema.name(), arguments);
    add_work(current());
    run_all();  // earlier work sees the memory as it was
  }
  Stack results;
  try {
    results = run_on_cpu(op, arguments);
  } catch (const c10::IndexError&) {  // found by the kernel, whose caller has gone on
    results.assign(schema.returns().size(), at::empty({0}, at::device(cuda(current_device))));
    state().failed = true;
  }
  if (capture != nullptr && current().capturing) capture->list.push_back({op, arguments, results});
  for (IValue& value : results) stack->push_back(std::move(value));
}

auto boxed() { return torch::CppFunction::makeFromBoxedFunction<&fallback>(); }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed()); }
TORCH_LIBRARY_IMPL(_, SparseCUDA, m) { m.fallback(boxed()); }
// These have kernels for all devices, which would be preferred to the fallback.
TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) {
  for (const char* name : {"_coalesced_", "_indices", "_nnz", "_values", "coalesce", "dense_dim",
                           "indices", "is_coalesced", "sparse_dim", "values"}) {
    m.impl(name, boxed());
  }
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("record_stream", [](at::Tensor&, c10::Stream) {});
  m.impl("copy_", boxed());  // the kernel for all devices looks for a part compiled for CUDA only
}

}  // namespace

}  // namespace fake_device
