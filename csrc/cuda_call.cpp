// Passes the CUDA tensors of one call to the CUDA backend.
#include "cuda_call.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Winterference-size"  // in CachingHostAllocator.h
#endif
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/headeronly/version.h>

#include <map>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace paramstats {
namespace {

const cuda::Api* backend = nullptr;
std::map<c10::DeviceIndex, std::string> device_errors;  // of the devices checked so far

std::runtime_error device_error(const c10::Device& device, const std::string& message) {
  return std::runtime_error("paramstats.summarize: " + message + " on " + device.str());
}

void check(const char* error, const c10::Device& device) {
  if (error != nullptr) {
    throw device_error(device, std::string("the CUDA runtime reports '") + error + "'");
  }
}

// The cudaStream_t of a stream.
void* handle_of(const c10::Stream& stream) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  return c10::impl::VirtualGuardImpl(stream.device_type()).getStreamNativeHandle(stream);
#else  // torch offers the handle of the current stream only, which is the one asked for
  const py::object handle = py::module_::import("torch._C").attr("_cuda_getCurrentRawStream");
  return reinterpret_cast<void*>(handle(static_cast<int>(stream.device_index())).cast<uintptr_t>());
#endif
}

// Allows this thread to query events while a graph is being captured, in its scope. By default CUDA
// treats a query as an error that invalidates the capture.
class RelaxedCaptureMode {
 public:
  RelaxedCaptureMode() : before_(backend->exchange_capture_mode(cuda::kRelaxedCapture)) {}
  ~RelaxedCaptureMode() { backend->exchange_capture_mode(before_); }
  RelaxedCaptureMode(const RelaxedCaptureMode&) = delete;
  RelaxedCaptureMode& operator=(const RelaxedCaptureMode&) = delete;

 private:
  int before_;
};

class CudaTransfer : public Transfer {
 public:
  CudaTransfer(c10::DataPtr host, std::vector<size_t> rows, const c10::Stream& stream, void* handle)
      : host_(std::move(host)),
        rows_(std::move(rows)),
        stream_(stream),
        handle_(handle),
        event_(std::make_unique<c10::Event>(c10::DeviceType::CUDA)) {}

  // Must be called after the reads were enqueued.
  void record_event() { event_->record(stream_); }

  // Returns the pinned memory to torch, which reuses it once the stream no longer writes to it.
  // After a device error, which is permanent, CUDA calls fail. An exception here would end the
  // process before it has reported that error, so memory and event are then leaked.
  ~CudaTransfer() override {
    try {
      const RelaxedCaptureMode relaxed;
      if (!event_->was_marked_for_recording()) throw std::runtime_error("enqueuing failed");
      if (!event_->query()) {
        bool capturing = false;
        backend->is_capturing(handle_, capturing);
        if (capturing) {
          event_->synchronize();  // record_event would become a part of the graph
        } else {
          at::getHostAllocator(c10::DeviceType::CUDA)
              ->record_event(host_.get(), host_.get_context(), stream_);
        }
      }
    } catch (...) {
      host_.release_context();
      static_cast<void>(event_.release());
    }
  }

  bool ready() const override {
    const RelaxedCaptureMode relaxed;
    return event_->query();
  }

  void write(Moments* table, size_t rows) const override {
    {
      const py::gil_scoped_release release;
      const RelaxedCaptureMode relaxed;
      event_->synchronize();
    }
    const auto* states = static_cast<const Moments*>(host_.get());
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (rows_[i] < rows) table[rows_[i]] = states[i];
    }
  }

 private:
  c10::DataPtr host_;
  std::vector<size_t> rows_;
  c10::Stream stream_;
  void* handle_;  // its cudaStream_t
  std::unique_ptr<c10::Event> event_;
};

}  // namespace

void use_cuda_backend(const py::capsule& api) {
  if (std::string(api.name()) != cuda::kApiName) {
    throw py::value_error(std::string("expected ") + cuda::kApiName + ", got " + api.name());
  }
  backend = api.get_pointer<cuda::Api>();
  device_errors.clear();
}

const std::string& cuda_error(c10::DeviceIndex device) {
  static const std::string none = "there is no CUDA backend";
  if (backend == nullptr) return none;
  const auto found = device_errors.find(device);
  if (found != device_errors.end()) return found->second;
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, device));
  const char* error = backend->check();
  return device_errors[device] = error == nullptr ? "" : error;
}

CudaCall::Group& CudaCall::group_of(const c10::Device& device) {
  for (Group& g : groups_) {
    if (g.stream.device() == device) return g;
  }
  if (backend == nullptr) {
    groups_.push_back({c10::Stream(c10::Stream::DEFAULT, device), nullptr, false, {}, {}, {}});
    return groups_.back();
  }
  const c10::DeviceGuard guard(device);  // the default stream's handle means the current device
  const c10::Stream stream = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(device);
  void* handle = handle_of(stream);
  bool capturing = false;
  check(backend->is_capturing(handle, capturing), device);
  if (capturing) {
    throw device_error(
        device,
        "expected no CUDA graph capture under way, got a stream that is being captured (call it "
        "before the capture, or between replays)");
  }
  groups_.push_back({stream, handle, cuda_error(device.index()).empty(), {}, {}, {}});
  Group& g = groups_.back();
  constexpr size_t kUsualTensors = 512;  // saves most reallocations
  g.views.reserve(kUsualTensors);
  g.storages.reserve(kUsualTensors);
  g.rows.reserve(kUsualTensors);
  return g;
}

bool CudaCall::add(const cuda::TensorView& view, const c10::TensorImpl& tensor, size_t row) {
  Group& g = group_of(tensor.device());
  if (!g.supported) return false;
  g.views.push_back(view);
  g.storages.push_back(tensor.storage());
  g.rows.push_back(row);
  return true;
}

std::vector<std::shared_ptr<Transfer>> CudaCall::start() {
  std::vector<std::shared_ptr<Transfer>> transfers;
  if (groups_.empty()) return transfers;
  const py::gil_scoped_release release;
  for (Group& g : groups_) {
    if (!g.views.empty()) transfers.push_back(start(g));
  }
  return transfers;
}

std::shared_ptr<Transfer> CudaCall::start(Group& g) {
  const c10::Device device = g.stream.device();
  const c10::DeviceGuard guard(device);
  const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
  const auto n = static_cast<int64_t>(g.views.size());
  const cuda::Sizes sizes = backend->sizes(g.views.data(), n);
  c10::DataPtr host = at::getHostAllocator(c10::DeviceType::CUDA)->allocate(sizes.host);
  void* results = host.get();
  // Freed at the end of this function: torch's allocator reuses it in stream order.
  const c10::DataPtr workspace = c10::GetAllocator(c10::DeviceType::CUDA)->allocate(sizes.device);
  auto transfer =
      std::make_shared<CudaTransfer>(std::move(host), std::move(g.rows), g.stream, g.handle);
  check(backend->enqueue(g.views.data(), n, results, workspace.get(), g.handle), device);
  transfer->record_event();
  if (g.stream != impl.getDefaultStream(device)) {
    for (const c10::Storage& s : g.storages) impl.recordDataPtrOnStream(s.data_ptr(), g.stream);
  }
  return transfer;
}

}  // namespace paramstats
