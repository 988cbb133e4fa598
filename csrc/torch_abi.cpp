// The functions and the memory layout of torch that this module uses.
#include "torch_abi.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace paramstats::torch_abi {

Api api;

namespace {

struct Function {
  const char* symbol;
  void** address;
};

std::vector<Function> functions() {
  return {
#define PARAMSTATS_ENTRY(name) {#name, reinterpret_cast<void**>(&api.name)},
      PARAMSTATS_SHIM(PARAMSTATS_ENTRY)
#undef PARAMSTATS_ENTRY
#define PARAMSTATS_ENTRY(name, type, symbol) {symbol, reinterpret_cast<void**>(&api.name)},
          PARAMSTATS_CXX(PARAMSTATS_ENTRY)
#undef PARAMSTATS_ENTRY
  };
}

// Throws if the function of torch's C interface with this name reports an error.
void check(AOTITorchError error, const char* name) {
  if (error != AOTI_TORCH_SUCCESS) throw_error(name);
}

template <class Value>
Value value_of(Impl t, AOTITorchError (*function)(AtenTensorHandle, Value*), const char* name) {
  Value value{};
  check(function(handle(t), &value), name);
  return value;
}
#define PARAMSTATS_VALUE(t, name) value_of(t, api.name, #name)

py::tuple tuple_of(Impl t, const int64_t* values) {
  py::tuple all(static_cast<size_t>(PARAMSTATS_VALUE(t, aoti_torch_get_dim)));
  for (size_t d = 0; d < all.size(); ++d) all[d] = values[d];
  return all;
}

Impl plain(py::handle tensor, const char* function) {
  if (!is_tensor(tensor.ptr()) || !is_plain(impl_of(tensor.ptr()))) {
    throw py::type_error(std::string("paramstats._native.") + function +
                         ": expected a plain tensor");
  }
  return impl_of(tensor.ptr());
}

// A class, whose reference is never released: extension modules are not unloaded.
PyTypeObject* class_of(const py::dict& found, const char* name) {
  return reinterpret_cast<PyTypeObject*>(py::object(found[name]).release().ptr());
}

}  // namespace

void throw_error(const char* name) {
  throw std::runtime_error(std::string(name) + " of torch reports an error");
}

py::tuple symbols() {
  const auto all = functions();
  py::tuple names(all.size());
  for (size_t i = 0; i < all.size(); ++i) names[i] = all[i].symbol;
  return names;
}

void connect(const py::dict& found) {
  const auto all = functions();
  const auto addresses = found["functions"].cast<std::vector<uintptr_t>>();
  const auto dtypes = found["dtypes"].cast<std::vector<size_t>>();
  if (addresses.size() != all.size() || dtypes.size() != kDTypes) {
    throw py::value_error(
        "paramstats._native.connect: expected one address for each of SYMBOLS "
        "and one number for each dtype");
  }
  for (size_t i = 0; i < all.size(); ++i) {
    *all[i].address = reinterpret_cast<void*>(addresses[i]);
  }
  std::fill(std::begin(api.dtypes), std::end(api.dtypes), static_cast<int8_t>(-1));
  for (int i = 0; i < kDTypes; ++i) {
    if (dtypes[i] >= std::size(api.dtypes)) {
      throw py::value_error("paramstats._native.connect: expected numbers of dtypes below " +
                            std::to_string(std::size(api.dtypes)) + ", got " +
                            std::to_string(dtypes[i]));
    }
    api.dtypes[dtypes[i]] = static_cast<int8_t>(i);
  }
  api.impl_offset = found["impl_offset"].cast<Py_ssize_t>();
  api.keys_offset = found["keys_offset"].cast<Py_ssize_t>();
  api.autograd_keys = found["autograd_keys"].cast<uint64_t>();
  api.plain_cpu_keys = found["plain_cpu_keys"].cast<uint64_t>();
  api.plain_cuda_keys = found["plain_cuda_keys"].cast<uint64_t>();
  api.metadata_keys = found["metadata_keys"].cast<uint64_t>();
  api.python_keys = found["python_keys"].cast<uint64_t>();
  api.tensor = class_of(found, "tensor");
  api.parameter = class_of(found, "parameter");
  AtenTensorHandle undefined;
  check(api.aoti_torch_new_uninitialized_tensor(&undefined), "aoti_torch_new_uninitialized_tensor");
  api.undefined = *reinterpret_cast<Impl*>(undefined);
  api.aoti_torch_delete_tensor_object(undefined);
  if (*api.grad(impl_of(found["plain"].ptr())) != api.undefined) {
    throw std::runtime_error("torch's C++ interface gave another gradient than Tensor.grad");
  }
}

py::dict metadata(py::handle tensor) {
  const Impl t = plain(tensor, "metadata");
  const Impl grad = *api.grad(t);
  py::dict all;
  all["sizes"] = tuple_of(t, PARAMSTATS_VALUE(t, aoti_torch_get_sizes));
  all["strides"] = tuple_of(t, PARAMSTATS_VALUE(t, aoti_torch_get_strides));
  all["numel"] = PARAMSTATS_VALUE(t, aoti_torch_get_numel);
  all["is_contiguous"] = PARAMSTATS_VALUE(t, aoti_torch_is_contiguous);
  all["dtype"] = PARAMSTATS_VALUE(t, aoti_torch_get_dtype);
  all["device_type"] = PARAMSTATS_VALUE(t, aoti_torch_get_device_type);
  all["device_index"] = PARAMSTATS_VALUE(t, aoti_torch_get_device_index);
  all["storage_offset"] = PARAMSTATS_VALUE(t, aoti_torch_get_storage_offset);
  all["storage_size"] = PARAMSTATS_VALUE(t, aoti_torch_get_storage_size);
  all["data_ptr"] = reinterpret_cast<uintptr_t>(PARAMSTATS_VALUE(t, torch_get_const_data_ptr));
  all["requires_grad"] = api.requires_grad(t);
  all["is_leaf"] = api.is_leaf(&t);
  all["retains_grad"] = api.retains_grad(&t);
  all["grad"] = grad == api.undefined ? py::none() : Owned::reference_to(grad).object();
  return all;
}

py::object alias(py::handle tensor) { return Owned::alias_of(plain(tensor, "alias")).object(); }

Owned Owned::alias_of(Impl t) {
  AtenTensorHandle alias;
  constexpr int64_t kMoreOffset = 0;  // is added to that of `t`
  check(api.aoti_torch__reinterpret_tensor(handle(t), PARAMSTATS_VALUE(t, aoti_torch_get_dim),
                                           PARAMSTATS_VALUE(t, aoti_torch_get_sizes),
                                           PARAMSTATS_VALUE(t, aoti_torch_get_strides), kMoreOffset,
                                           &alias),
        "aoti_torch__reinterpret_tensor");
  Owned owned = reference_to(*reinterpret_cast<Impl*>(alias));
  api.aoti_torch_delete_tensor_object(alias);
  return owned;
}

py::object Owned::object() const {
  auto found = py::reinterpret_steal<py::object>(api.wrap(&tensor_));
  if (!found) throw py::error_already_set();
  return found;
}

}  // namespace paramstats::torch_abi
