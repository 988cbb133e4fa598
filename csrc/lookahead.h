// Loads the objects of many tensors into the cache while earlier tensors are read. A tensor is
// several objects in different places: without this, most of the time for 20,000 small tensors is
// spent waiting for memory.
#pragma once

#include <cstdint>

#include "torch_abi.h"

namespace paramstats {

// Prefetches the tensors after the one that is read, and their gradients if `grads`, in steps: each
// needs what the step before it has loaded. object_at(i) returns the i-th Python object of n, of
// any class.
template <class ObjectAt>
class Lookahead {
 public:
  Lookahead(size_t n, bool grads, ObjectAt object_at)
      : n_(n > kMin ? n : 0), grads_(grads), object_at_(object_at) {
    for (size_t i = 0; i < kSteps * kDistance && n_ > 0; ++i) step(i);
  }

  // Must be called with i = 0, 1, ..., before tensor i is read.
  void advance(size_t i) {
    if (n_ > 0) step(i + kSteps * kDistance);
  }

 private:
  static constexpr size_t kMin = 32;  // fewer tensors are not worth it
  static constexpr size_t kSteps = 3;
  static constexpr size_t kDistance = 2;         // tensors between two steps
  static constexpr Py_ssize_t kImplBytes = 256;  // a TensorImpl has 208 in torch 2.13

  void step(size_t i) {
    if (i < n_) prefetch(object_at_(i), 1);
    if (const auto t = impl_at(i - kDistance)) prefetch(t, kImplBytes);
    if (!grads_) return;
    if (const auto t = impl_at(i - 2 * kDistance)) prefetch(*torch_abi::api.grad(t), kImplBytes);
  }

  // Starts to load memory without waiting for it. Any address is allowed.
  static void prefetch(const void* memory, Py_ssize_t bytes) {
    constexpr Py_ssize_t kCacheLine = 64;
    for (Py_ssize_t i = 0; i < bytes; i += kCacheLine) {
      __builtin_prefetch(static_cast<const char*>(memory) + i);
    }
  }

  torch_abi::Impl impl_at(size_t i) const {  // null for other classes: their layout is not known
    if (i >= n_) return nullptr;             // also if it would be negative
    PyObject* object = object_at_(i);
    return torch_abi::is_exact_tensor(object) ? torch_abi::impl_of(object) : nullptr;
  }

  size_t n_;
  bool grads_;
  ObjectAt object_at_;
};

}  // namespace paramstats
