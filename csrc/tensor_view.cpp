// Decides which tensors the kernels can read, and describes the memory of these tensors.
#include "tensor_view.h"

#include <c10/core/DispatchKeySet.h>

#include "cpu/strides.h"

namespace paramstats {
namespace {

// The dispatch keys of a tensor without those of autograd. A tensor that has exactly the keys of a
// plain tensor is no subclass with its own operators, has no lazy conjugation or negation, and is
// not sparse, quantized, nested, from functorch or on another device.
uint64_t kind_of(const c10::TensorImpl& t) {
  const auto autograd = c10::DispatchKeySet(c10::DispatchKey::AutogradFunctionality) |
                        c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  return t.key_set().raw_repr() & ~autograd.raw_repr();
}

// The keys of a plain tensor. Does not call at::empty, which an active dispatch mode would change.
uint64_t plain_kind(c10::DispatchKey key, c10::DeviceType device) {
  return kind_of(*c10::make_intrusive<c10::TensorImpl>(
      c10::DispatchKeySet(key), caffe2::TypeMeta::Make<float>(), c10::Device(device, 0)));
}

std::optional<DType> native_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kFloat8_e4m3fn: return DType::kFloat8E4M3FN;
    case at::kFloat8_e5m2: return DType::kFloat8E5M2;
    case at::kChar: return DType::kInt8;
    case at::kByte: return DType::kUInt8;
    case at::kBool: return DType::kBool;
    case at::kShort: return DType::kInt16;
    case at::kUInt16: return DType::kUInt16;
    case at::kInt: return DType::kInt32;
    case at::kUInt32: return DType::kUInt32;
    case at::kLong: return DType::kInt64;
    case at::kUInt64: return DType::kUInt64;
    default: return std::nullopt;
  }
}

// Whether the storage really holds all elements. Sharding libraries may free the storage of a live
// tensor, and code from torch.compile does not check sizes and strides.
bool storage_holds(const c10::TensorImpl& t) {
  int64_t first = t.storage_offset(), last = first;
  for (int64_t d = 0; d < t.dim(); ++d) {
    int64_t extent;
    if (__builtin_mul_overflow(t.size(d) - 1, t.stride(d), &extent)) return false;
    int64_t& end = extent < 0 ? first : last;
    if (__builtin_add_overflow(end, extent, &end)) return false;
  }
  uint64_t bytes;
  return first >= 0 &&
         !__builtin_mul_overflow(static_cast<uint64_t>(last) + 1, t.itemsize(), &bytes) &&
         bytes <= t.storage().nbytes();
}

}  // namespace

bool is_plain_cpu(const c10::TensorImpl& t) {
  static const uint64_t plain = plain_kind(c10::DispatchKey::CPU, c10::kCPU);
  return kind_of(t) == plain && !t.has_symbolic_sizes_strides();
}

bool is_plain_cuda(const c10::TensorImpl& t) {
  static const uint64_t plain = plain_kind(c10::DispatchKey::CUDA, c10::kCUDA);
  return kind_of(t) == plain && !t.has_symbolic_sizes_strides();
}

std::optional<cpu::TensorView> native_view(const c10::TensorImpl& t) {
  const auto dtype = native_dtype(c10::typeMetaToScalarType(t.dtype()));
  if (!dtype) return std::nullopt;
  const int64_t numel = t.numel();
  if (numel > 0 && !storage_holds(t)) return std::nullopt;
  // Storage::data() instead of data_ptr(), which would make a copy-on-write tensor copy itself.
  const auto* data = static_cast<const char*>(t.storage().data());
  if (numel > 0) data += t.storage_offset() * static_cast<int64_t>(t.itemsize());
  return cpu::TensorView{
      data, *dtype, numel, static_cast<int>(t.dim()), t.sizes().data(), t.strides().data()};
}

std::optional<cuda::TensorView> native_cuda_view(const c10::TensorImpl& t) {
  const auto view = native_view(t);
  if (!view) return std::nullopt;
  const bool dense =
      view->numel == 0 || cpu::is_contiguous(*view) || cpu::is_dense(cpu::memory_order(*view));
  const auto misaligned = reinterpret_cast<uintptr_t>(view->data) % element_size(view->dtype);
  if (!dense || misaligned != 0) return std::nullopt;
  return cuda::TensorView{view->data, view->numel, view->dtype};
}

}  // namespace paramstats
