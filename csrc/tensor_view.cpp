// Describes the memory of the tensors that the kernels can read.
#include "tensor_view.h"

#include <iterator>

#include "cpu/strides.h"

namespace paramstats {
namespace {

using torch_abi::api;
using torch_abi::Impl;

// Whether a storage of `bytes` really holds all elements of a view that starts at element `first`.
// Sharding libraries may free the storage of a live tensor, and code from torch.compile does not
// check sizes and strides.
bool storage_holds(const cpu::TensorView& view, int64_t first, int64_t bytes) {
  int64_t last = first;
  for (int d = 0; d < view.ndim; ++d) {
    int64_t extent;
    if (__builtin_mul_overflow(view.sizes[d] - 1, view.strides[d], &extent)) return false;
    int64_t& end = extent < 0 ? first : last;
    if (__builtin_add_overflow(end, extent, &end)) return false;
  }
  uint64_t needed;
  return first >= 0 &&
         !__builtin_mul_overflow(static_cast<uint64_t>(last) + 1, element_size(view.dtype),
                                 &needed) &&
         needed <= static_cast<uint64_t>(bytes);
}

constexpr AOTITorchError kOk = AOTI_TORCH_SUCCESS;

}  // namespace

std::optional<DType> dtype_of(Impl t) {
  int32_t number;
  if (api.aoti_torch_get_dtype(torch_abi::handle(t), &number) != kOk || number < 0 ||
      number >= static_cast<int32_t>(std::size(api.dtypes)) || api.dtypes[number] < 0) {
    return std::nullopt;
  }
  return static_cast<DType>(api.dtypes[number]);
}

std::optional<cpu::TensorView> native_view(Impl t) {
  const AtenTensorHandle h = torch_abi::handle(t);
  const auto dtype = dtype_of(t);
  if (!dtype) return std::nullopt;
  int64_t *sizes, *strides, dim, first, bytes;
  if (api.aoti_torch_get_dim(h, &dim) != kOk || api.aoti_torch_get_sizes(h, &sizes) != kOk ||
      api.aoti_torch_get_strides(h, &strides) != kOk) {
    return std::nullopt;
  }
  cpu::TensorView view{nullptr, *dtype, 1, static_cast<int>(dim), sizes, strides};
  for (int64_t d = 0; d < dim; ++d) {
    if (__builtin_mul_overflow(view.numel, sizes[d], &view.numel)) return std::nullopt;
  }
  // Last, because to ask for the address in a storage without memory is an error, which torch 2.10
  // and 2.11 print.
  if (view.numel > 0 &&
      (api.aoti_torch_get_storage_offset(h, &first) != kOk ||
       api.aoti_torch_get_storage_size(h, &bytes) != kOk || !storage_holds(view, first, bytes) ||
       api.torch_get_const_data_ptr(h, &view.data) != kOk)) {
    return std::nullopt;
  }
  if (dim > 0) view.rows = sizes[0];
  if (cpu::is_contiguous(view)) view.ndim = 0;
  return view;
}

std::optional<cuda::TensorView> native_cuda_view(Impl t) {
  const AtenTensorHandle h = torch_abi::handle(t);
  cuda::TensorView out{};
  bool is_contiguous = false;
  int64_t first, bytes, last;
  if (api.aoti_torch_is_contiguous(h, &is_contiguous) == kOk && is_contiguous) {
    const auto dtype = dtype_of(t);
    if (!dtype || api.aoti_torch_get_numel(h, &out.numel) != kOk) return std::nullopt;
    out.dtype = *dtype;
    if (out.numel == 0) return out;
    if (api.aoti_torch_get_storage_offset(h, &first) != kOk ||
        api.aoti_torch_get_storage_size(h, &bytes) != kOk || first < 0 ||
        __builtin_add_overflow(first, out.numel, &last) || last > bytes >> log2_size(out.dtype) ||
        api.torch_get_const_data_ptr(h, &out.data) != kOk) {
      return std::nullopt;
    }
  } else {
    const auto view = native_view(t);
    if (!view || !(view->numel == 0 || cpu::is_dense(cpu::memory_order(*view))))
      return std::nullopt;
    out = {view->data, view->numel, view->dtype};
  }
  int64_t *sizes, *strides, dim;
  if (api.aoti_torch_get_dim(h, &dim) == kOk && dim > 0 && out.numel > 0 &&
      api.aoti_torch_get_sizes(h, &sizes) == kOk &&
      (is_contiguous || api.aoti_torch_get_strides(h, &strides) == kOk)) {
    out.size0 = sizes[0];
    out.inner = is_contiguous || sizes[0] == 1 ? out.numel / sizes[0] : strides[0];
  }
  const auto misaligned = reinterpret_cast<uintptr_t>(out.data) % element_size(out.dtype);
  if (misaligned != 0) return std::nullopt;
  return out;
}

}  // namespace paramstats
