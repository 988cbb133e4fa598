// A fake CUDA for torch without CUDA: devices, streams, events and allocators for c10, on the
// runtime of tests/cpp/cuda_shim, and the source of the CUDA backend compiled for it. With it,
// `paramstats.summarize` runs the same code as on a GPU, on tensors that report a CUDA device.
//
// Enqueued work runs only when the program waits for it or calls run(). Freed memory is overwritten
// in the order of the stream on which it was allocated, after the streams on which it was recorded,
// because torch's caching allocators would reuse it then. Code that reads it too late reads
// garbage.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cuda_runtime.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/engine.h"

namespace py = pybind11;

namespace {

using c10::DeviceIndex;
using c10::DeviceType;

constexpr DeviceIndex kDevices = 2;
constexpr int kStreams = 4;  // per device; the first is the default stream
constexpr int kGarbage = 0xa5;

std::string failing;      // the function that fails; "device" is a permanent device error
bool terminated = false;  // whether a destructor threw, which would have ended the process

struct State {
  int allocations = 0, recorded = 0;
  c10::StreamId current[kDevices] = {};
  cudaStream_t streams[kDevices][kStreams] = {};
  State() {
    for (DeviceIndex d = 0; d < kDevices; ++d) {
      cudaSetDevice(d);
      for (int s = 1; s < kStreams; ++s) cudaStreamCreate(&streams[d][s]);
    }
    cudaSetDevice(0);
  }
};
State& state() {
  static auto* s = new State();
  return *s;
}

cudaStream_t handle(const c10::Stream& s) { return state().streams[s.device_index()][s.id()]; }

c10::Stream stream_of(DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(DeviceType::CUDA, device), id);
}

DeviceIndex current_device() {
  int device;
  cudaGetDevice(&device);
  return static_cast<DeviceIndex>(device);
}

struct OnDevice {
  DeviceIndex before = current_device();
  explicit OnDevice(DeviceIndex device) { cudaSetDevice(device); }
  ~OnDevice() { cudaSetDevice(before); }
};

// ---- memory --------------------------------------------------------------------------------

struct Block {
  std::vector<unsigned char> memory;
  bool is_host;
  c10::Stream owner;
  std::vector<c10::Stream> recorded;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  if (failing == "device" && !block->recorded.empty())
    terminated = true;  // torch records events here
  const OnDevice on(block->owner.device_index());
  if (block->is_host && block->recorded.empty()) {
    std::memset(block->memory.data(), kGarbage, block->memory.size());
  } else {
    const c10::Stream last = block->is_host ? block->recorded.back() : block->owner;
    for (const c10::Stream& s : block->recorded) {
      cudaEvent_t event;
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      cudaEventRecord(event, handle(s));
      cudaStreamWaitEvent(handle(last), event);
    }
    cudaMemsetAsync(block->memory.data(), kGarbage, block->memory.size(), handle(last));
  }
  // The block itself is leaked: the memory must stay readable.
}

c10::DataPtr allocate(size_t bytes, bool is_host) {
  const DeviceIndex device = current_device();
  auto* block = new Block{std::vector<unsigned char>(bytes, kGarbage),
                          is_host,
                          stream_of(device, state().current[device]),
                          {}};
  ++state().allocations;
  const c10::Device where = is_host ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, device);
  return {block->memory.data(), block, free_block, where};
}

struct DeviceAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t n) override { return ::allocate(n, false); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

struct HostAllocator : at::HostAllocator {
  c10::DataPtr allocate(size_t n) override { return ::allocate(n, true); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool record_event(void*, void* context, c10::Stream stream) override {
    static_cast<Block*>(context)->recorded.push_back(stream);
    return true;
  }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

// ---- devices, streams, events --------------------------------------------------------------

struct Guard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  c10::Device getDevice() const override { return {DeviceType::CUDA, current_device()}; }
  void setDevice(c10::Device d) const override { cudaSetDevice(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { cudaSetDevice(d.index()); }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    setDevice(d);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(c10::Device d) const override {
    return stream_of(d.index(), state().current[d.index()]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream_of(d.index(), 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const c10::Stream before = getStream(s.device());
    state().current[s.device_index()] = s.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return handle(s); }
  void record(void** event, const c10::Stream& s, DeviceIndex, c10::EventFlag) const override {
    const OnDevice on(s.device_index());
    cudaEvent_t e = static_cast<cudaEvent_t>(*event);
    if (e == nullptr) cudaEventCreateWithFlags(&e, cudaEventDisableTiming);
    cudaEventRecord(e, handle(s));
    *event = e;
  }
  void block(void* event, const c10::Stream& s) const override {
    cudaStreamWaitEvent(handle(s), static_cast<cudaEvent_t>(event));
  }
  static void check(cudaError_t error) {
    if (error == cudaSuccess && failing != "device") return;
    cudaGetLastError();
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
  }
  bool queryEvent(void* event) const override {
    const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (error != cudaErrorNotReady || failing == "device") check(error);
    cudaGetLastError();
    return error == cudaSuccess;
  }
  void synchronizeEvent(void* event) const override {
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    if (failing == "device") terminated = true;
    if (event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    auto* block = static_cast<Block*>(data.get_context());
    if (s != block->owner) block->recorded.push_back(s);
    ++state().recorded;
  }
};
Guard guard;
DeviceAllocator device_allocator;
HostAllocator host_allocator;

void install() {
  c10::impl::registerDeviceGuard(DeviceType::CUDA, &guard);
  c10::SetAllocator(DeviceType::CUDA, &device_allocator);
  at::setHostAllocator(DeviceType::CUDA, &host_allocator);
}

// The CUDA backend, whose functions fail if a test asks for it.
const char* check() {
  return failing == "check" ? "no kernel image" : paramstats::cuda::api().check();
}

const char* is_capturing(void* stream, bool& capturing) {
  if (failing == "is_capturing") return "implicit capture";
  return paramstats::cuda::api().is_capturing(stream, capturing);
}

const char* enqueue(const paramstats::cuda::TensorView* tensors, int64_t n, void* host,
                    void* device, void* stream) {
  if (failing == "enqueue") return "launch failure";
  return paramstats::cuda::api().enqueue(tensors, n, host, device, stream);
}

const paramstats::cuda::Api& api() {
  const auto& real = paramstats::cuda::api();
  static const paramstats::cuda::Api functions = {check, is_capturing, real.exchange_capture_mode,
                                                  real.sizes, enqueue};
  return functions;
}

// Copies a CPU tensor to a device, with the same storage, sizes and strides.
at::Tensor to(const at::Tensor& cpu, DeviceIndex device) {
  const OnDevice on(device);
  const auto& storage = cpu.storage();
  c10::DataPtr memory = device_allocator.allocate(storage.nbytes());
  std::memcpy(memory.get(), storage.data(), storage.nbytes());
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory)),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), cpu.dtype());
  impl->set_storage_offset(cpu.storage_offset());
  impl->set_sizes_and_strides(cpu.sizes(), cpu.strides());
  return at::Tensor(std::move(impl));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install);
  m.def("api", [] { return py::capsule(&api(), paramstats::cuda::kApiName); });
  m.def("old_api", [] { return py::capsule(&api(), "paramstats.cuda.Api/0"); });
  m.def("to", &to);
  m.def("use_stream", [](DeviceIndex d, c10::StreamId s) { state().current[d] = s; });
  m.def("set_capturing", [](DeviceIndex d, c10::StreamId s, bool capturing) {
    cuda_shim::set_capturing(state().streams[d][s], capturing);
  });
  m.def("capture_invalidated", &cuda_shim::capture_invalidated);
  m.def("run", &cuda_shim::run_all);
  m.def("terminated", [] { return terminated; });
  m.def("fail", [](const std::string& function) { failing = function; });
  m.def("counts", [] {
    py::dict counts;
    counts["launches"] = cuda_shim::launches();
    counts["copies"] = cuda_shim::copies();
    counts["waits"] = cuda_shim::synchronizations();
    counts["allocations"] = state().allocations;
    counts["recorded"] = state().recorded;
    return counts;
  });
}
