// The functions and the memory layout of torch that this module uses. The module is not linked to
// torch, so one binary runs with every torch >= 2.10: paramstats/_core/torch_abi.py finds these
// functions in the torch that is running, compares their results with torch in Python, and calls
// `connect`.
//
// - The functions of torch's stable C interface (shim.h), which torch promises to keep.
// - Five exported C++ functions whose arguments and results are pointers and bool.
// - Two measured offsets: of the TensorImpl pointer in a Python tensor, and of the dispatch keys in
//   a TensorImpl.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000  // 2.10.0, the oldest supported torch
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <utility>

#include "dtypes.h"

namespace paramstats::torch_abi {

// The address of a c10::TensorImpl.
using Impl = const void*;

#define PARAMSTATS_SHIM(X)               \
  X(aoti_torch_get_sizes)                \
  X(aoti_torch_get_strides)              \
  X(aoti_torch_get_dim)                  \
  X(aoti_torch_get_numel)                \
  X(aoti_torch_is_contiguous)            \
  X(aoti_torch_get_dtype)                \
  X(aoti_torch_get_device_type)          \
  X(aoti_torch_get_device_index)         \
  X(aoti_torch_get_storage_offset)       \
  X(aoti_torch_get_storage_size)         \
  X(torch_get_const_data_ptr)            \
  X(aoti_torch__reinterpret_tensor)      \
  X(aoti_torch_assign_tensors)           \
  X(aoti_torch_new_uninitialized_tensor) \
  X(aoti_torch_delete_tensor_object) X(torch_parallel_for) X(torch_get_num_threads)

#define PARAMSTATS_CXX(X)                                                       \
  X(grad, const Impl* (*)(Impl), "_ZNK3c1010TensorImpl4gradEv")                 \
  X(requires_grad, bool (*)(Impl), "_ZNK3c1010TensorImpl13requires_gradEv")     \
  X(is_leaf, bool (*)(const Impl*), "_ZNK2at10TensorBase7is_leafEv")            \
  X(retains_grad, bool (*)(const Impl*), "_ZNK2at10TensorBase12retains_gradEv") \
  X(wrap, PyObject* (*)(const Impl*), "_Z16THPVariable_WrapRKN2at10TensorBaseE")

struct Api {
#define PARAMSTATS_FIELD(name) decltype(&::name) name;
  PARAMSTATS_SHIM(PARAMSTATS_FIELD)
#undef PARAMSTATS_FIELD
#define PARAMSTATS_FIELD(name, type, symbol) std::common_type_t<type> name;
  PARAMSTATS_CXX(PARAMSTATS_FIELD)
#undef PARAMSTATS_FIELD
  Py_ssize_t impl_offset, keys_offset;  // bytes
  // Dispatch keys: those that autograd adds to any tensor; those of plain tensors without them;
  // those of tensors whose metadata can be read without running Python code; those of subclasses
  // with operators in Python.
  uint64_t autograd_keys, plain_cpu_keys, plain_cuda_keys, metadata_keys, python_keys;
  Impl undefined;  // that of a tensor that is not defined; what `grad` points to without a gradient
  PyTypeObject *tensor, *parameter;
  int8_t dtypes[128];  // torch's number of a dtype -> DType, or -1
};
extern Api api;

// The symbols of all functions of `api`, in the order in which `connect` expects their addresses.
pybind11::tuple symbols();

// Fills `api` from a dict with the keys "functions" (addresses), "dtypes" (torch's number of each
// DType), "plain" (a tensor without a gradient), and other fields of Api by their names.
void connect(const pybind11::dict& found);

// What torch's functions report of a plain tensor, to compare it with torch in Python; see
// _native.pyi. (Of another tensor some report errors, which torch 2.10 and 2.11 print.)
pybind11::dict metadata(pybind11::handle tensor);

// Another tensor with the same storage, sizes and strides as a plain tensor.
pybind11::object alias(pybind11::handle tensor);

inline AtenTensorHandle handle(const Impl& t) {  // an at::Tensor is such a pointer
  return reinterpret_cast<AtenTensorHandle>(const_cast<void**>(&const_cast<void* const&>(t)));
}

inline Impl impl_of(PyObject* tensor) {
  Impl t;
  std::memcpy(&t, reinterpret_cast<const char*>(tensor) + api.impl_offset, sizeof(t));
  return t;
}

inline uint64_t keys_of(Impl t) {
  uint64_t keys;
  std::memcpy(&keys, static_cast<const char*>(t) + api.keys_offset, sizeof(keys));
  return keys;
}

// Whether an object is of the class Tensor or Parameter; of these or a subclass.
inline bool is_exact_tensor(PyObject* object) {
  return Py_TYPE(object) == api.tensor || Py_TYPE(object) == api.parameter;
}
inline bool is_tensor(PyObject* object) {
  return is_exact_tensor(object) || PyType_IsSubtype(Py_TYPE(object), api.tensor);
}

// A plain tensor is strided and its memory holds its elements as they are: it has exactly the
// dispatch keys of a plain tensor on the CPU or on CUDA. A subclass with its own operators, lazy
// conjugation or negation, a sparse, quantized, nested or functorch tensor has others.
inline bool is_plain_cpu(Impl t) { return (keys_of(t) & ~api.autograd_keys) == api.plain_cpu_keys; }
inline bool is_plain_cuda(Impl t) {
  return (keys_of(t) & ~api.autograd_keys) == api.plain_cuda_keys;
}
inline bool is_plain(Impl t) { return is_plain_cpu(t) || is_plain_cuda(t); }

inline int64_t numel(Impl t) {
  int64_t n = 0;
  api.aoti_torch_get_numel(handle(t), &n);
  return n;
}

// Throws an error that names the function of torch's C interface that reported one.
[[noreturn]] void throw_error(const char* name);

// An at::Tensor: owns a reference to its TensorImpl.
class Owned {
 public:
  // Another reference to the same tensor.
  static Owned reference_to(Impl t) {
    Owned owned;
    if (api.aoti_torch_assign_tensors(handle(t), handle(owned.tensor_)) != AOTI_TORCH_SUCCESS) {
      throw_error("aoti_torch_assign_tensors");
    }
    return owned;
  }
  // Another tensor with the same storage, sizes and strides. It keeps the storage alive even if
  // the first tensor gets another one.
  static Owned alias_of(Impl t);

  Owned(Owned&& other) noexcept : tensor_(std::exchange(other.tensor_, api.undefined)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(tensor_, other.tensor_);
    return *this;
  }
  ~Owned() {
    if (tensor_ == api.undefined) return;
    const Impl undefined = api.undefined;
    api.aoti_torch_assign_tensors(handle(undefined), handle(tensor_));
  }

  Impl impl() const { return tensor_; }
  // The Python object of the tensor. May run Python code.
  pybind11::object object() const;

 private:
  Owned() = default;
  Impl tensor_ = api.undefined;
};

}  // namespace paramstats::torch_abi
