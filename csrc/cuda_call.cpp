#include "cuda_call.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Winterference-size"  // of the header below
#endif
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace paramstats {
namespace {

const cuda::Api* engine = nullptr;
std::map<c10::DeviceIndex, std::string> troubles;  // found so far

std::runtime_error failure(const c10::Device& device, const std::string& what) {
  return std::runtime_error("paramstats.summarize: " + what + " on " + device.str());
}

void check(const char* error, const c10::Device& device) {
  if (error != nullptr) {
    throw failure(device, std::string("the CUDA runtime reports '") + error + "'");
  }
}

// The cudaStream_t of a stream.
void* native_handle(const c10::Stream& stream) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  return c10::impl::VirtualGuardImpl(stream.device_type()).getStreamNativeHandle(stream);
#else  // only the current one's; it is
  const py::object handle = py::module_::import("torch._C").attr("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(handle(static_cast<int>(stream.device_index())).cast<uintptr_t>());
#endif
}

class CudaTransfer : public Transfer {
 public:
  CudaTransfer(c10::DataPtr host, std::vector<size_t> rows, const c10::Stream& stream)
      : host_(std::move(host)), rows_(std::move(rows)), event_(c10::DeviceType::CUDA) {
    event_.record(stream);
  }

  bool ready() const override { return event_.query(); }

  void write(Moments* table, size_t rows) const override {
    {
      const py::gil_scoped_release release;
      event_.synchronize();
    }
    const auto* states = static_cast<const Moments*>(host_.get());
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (rows_[i] < rows) table[rows_[i]] = states[i];
    }
  }

 private:
  c10::DataPtr host_;  // pinned; torch does not reuse it before its stream has been here
  std::vector<size_t> rows_;
  c10::Event event_;
};

}  // namespace

void use_cuda_engine(const py::capsule& api) {
  if (std::string(api.name()) != cuda::kApiName) {
    throw py::value_error(std::string("it is ") + api.name() + ", not " + cuda::kApiName);
  }
  engine = api.get_pointer<cuda::Api>();
  troubles.clear();
}

const std::string& cuda_trouble(c10::DeviceIndex device) {
  static const std::string none = "there is no CUDA engine";
  if (engine == nullptr) return none;
  const auto found = troubles.find(device);
  if (found != troubles.end()) return found->second;
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, device));
  const char* error = engine->check();
  return troubles[device] = error == nullptr ? "" : error;
}

CudaCall::Group& CudaCall::group_of(const c10::Device& device) {
  for (Group& g : groups_) {
    if (g.device == device) return g;
  }
  constexpr size_t kCommon = 512;  // tensors: not to grow from nothing at every call
  groups_.push_back({device, cuda_trouble(device.index()).empty(), {}, {}, {}});
  Group& g = groups_.back();
  g.views.reserve(kCommon);
  g.tensors.reserve(kCommon);
  g.rows.reserve(kCommon);
  return g;
}

bool CudaCall::add(const cuda::TensorView& view, const c10::TensorImpl& tensor, size_t row) {
  Group& g = group_of(tensor.device());
  if (!g.runs) return false;
  g.views.push_back(view);
  g.tensors.push_back(&tensor);
  g.rows.push_back(row);
  return true;
}

std::vector<std::shared_ptr<Transfer>> CudaCall::start() {
  std::vector<std::shared_ptr<Transfer>> out;
  groups_.erase(std::remove_if(groups_.begin(), groups_.end(),
                               [](const Group& g) { return g.views.empty(); }),
                groups_.end());
  if (groups_.empty()) return out;
  const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
  for (const Group& g : groups_) {
    const c10::DeviceGuard guard(g.device);  // a default stream is the current device's
    bool capturing = false;
    check(engine->is_capturing(native_handle(impl.getStream(g.device)), capturing), g.device);
    if (capturing) {
      throw failure(g.device,
                    "expected no CUDA graph capture under way, got a stream that is being captured "
                    "(call it before the capture, or between replays)");
    }
  }
  for (Group& g : groups_) {
    const c10::DeviceGuard guard(g.device);
    const c10::Stream stream = impl.getStream(g.device);
    const auto n = static_cast<int64_t>(g.views.size());
    const cuda::Sizes sizes = engine->sizes(g.views.data(), n);
    at::HostAllocator* pinned = at::getHostAllocator(c10::DeviceType::CUDA);
    c10::DataPtr host = pinned->allocate(sizes.host);
    const c10::DataPtr device = c10::GetAllocator(c10::DeviceType::CUDA)->allocate(sizes.device);
    const char* error =
        engine->enqueue(g.views.data(), n, host.get(), device.get(), native_handle(stream));
    pinned->record_event(host.get(), host.get_context(), stream);
    check(error, g.device);
    if (stream != impl.getDefaultStream(g.device)) {
      for (const c10::TensorImpl* t : g.tensors) {
        impl.recordDataPtrOnStream(t->storage().data_ptr(), stream);
      }
    }
    out.push_back(std::make_shared<CudaTransfer>(std::move(host), std::move(g.rows), stream));
  }
  return out;
}

}  // namespace paramstats
