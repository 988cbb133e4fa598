// A fake CUDA device for a build of torch without CUDA: tensors that report a CUDA device, whose
// memory is the host's. This file has the memory, the interfaces of torch and the Python module.
// torch_cuda.py has the part in Python.
#include "fake_device.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>

#include <set>

namespace fake_device {
namespace {

namespace py = pybind11;
using c10::Device;

// ---- memory --------------------------------------------------------------------------------

// Memory is freed only after the work that may read it.
void free_later(void* context) {
  run_all();
  delete static_cast<c10::Storage*>(context);
}

c10::Storage cpu_storage(size_t bytes) {
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, c10::GetAllocator(c10::kCPU), true);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return as_device_memory(cpu_storage(bytes), cuda(current_device));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
DeviceAllocator allocator;

std::set<const void*>& pinned() {
  static auto* addresses = new std::set<const void*>;
  return *addresses;
}

// Pinned memory, at one address for host and device: that of the shim cannot be read by one thread
// while another one runs kernels.
struct PinnedAllocator final : c10::Allocator {
  static void free(void* memory) {
    {
      const std::lock_guard<std::mutex> lock(state().mutex);
      pinned().erase(memory);
    }
    c10::GetAllocator(c10::kCPU)->raw_deallocate(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::GetAllocator(c10::kCPU)->raw_allocate(std::max<size_t>(bytes, 1));
    const std::lock_guard<std::mutex> lock(state().mutex);
    pinned().insert(memory);
    return {memory, memory, free, Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* address) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return pinned().count(address) != 0;
}

// ---- the interfaces of torch ---------------------------------------------------------------

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return fake_device::current_device; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return fake_device::current_device; }
  void setCurrentDevice(c10::DeviceIndex d) const override { fake_device::current_device = d; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override {
    return static_cast<c10::DeviceIndex>(std::exchange(fake_device::current_device, d));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override {
    return exchangeDevice(d);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
};

// `import torch` has created torch's hooks already: these take the place of that object.
void replace_hooks() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
}

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  GuardImpl() = default;
  explicit GuardImpl(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device d) const override {
    return cuda(std::exchange(current_device, d.index()));
  }
  Device getDevice() const override { return cuda(current_device); }
  void setDevice(Device d) const override { current_device = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current_device = d.index(); }
  c10::Stream getStream(Device d) const override { return stream_of(d.index()); }
  c10::Stream getDefaultStream(Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream getNewStream(Device d, int) const override {
    const int device = d.has_index() ? d.index() : current_device;
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    // like torch, which has a pool of 32 streams
    const int id = 1 + (s.stream_count[device]++ - 1) % (kMaxStreams - 1);
    StreamState& found = s.streams[device][id];
    if (found.handle == nullptr) found.handle = new_stream(device);
    return c10::Stream(c10::Stream::UNSAFE, cuda(device), id);
  }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const int before = std::exchange(current_stream[s.device_index()], static_cast<int>(s.id()));
    return c10::Stream(c10::Stream::UNSAFE, s.device(), before);
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return state().of(s).handle; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void synchronizeStream(const c10::Stream& s) const override {
    wait_until(state().of(s).busy_until);
  }
  // Events of torch's own C++ code: all work but _sleep() is done when it was enqueued.
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, GuardImpl);

}  // namespace

c10::DataPtr as_device_memory(const c10::Storage& cpu, Device device) {
  return {const_cast<void*>(cpu.data()), new c10::Storage(cpu), free_later, device};
}

c10::Allocator* device_allocator() { return &allocator; }

// ---- Python --------------------------------------------------------------------------------

StreamState& stream_state(int device, int stream) { return state().streams[device][stream]; }

void spin(int64_t nanoseconds) {
  add_work(current(), nanoseconds);
  log("cuda_runtime", "cudaLaunchKernel", "kernel", "spin_kernel");
}

void synchronize(int device, int stream) {  // stream -1: all
  log("cuda_runtime", stream < 0 ? "cudaDeviceSynchronize" : "cudaStreamSynchronize");
  for (int i = 0; i < kMaxStreams; ++i) {
    if (stream < 0 || stream == i) wait_until(stream_state(device, i).busy_until);
  }
}

}  // namespace fake_device

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fake_device;  // NOLINT
  replace_hooks();
  c10::SetAllocator(c10::kCUDA, device_allocator());
  m.attr("DEVICES") = kDevices;
  m.def("now", &now);
  m.def("current_device", [] { return current_device; });
  m.def("set_device", [](int device) { current_device = device; });
  m.def("current_stream", [](int device) { return current_stream[device]; });
  m.def("set_stream", [](int device, int stream) { current_stream[device] = stream; });
  m.def("handle", [](int device, int stream) {
    return reinterpret_cast<uintptr_t>(stream_state(device, stream).handle);
  });
  m.def("busy_until", [](int device, int stream) {
    return std::max(stream_state(device, stream).busy_until, now());
  });
  m.def("wait_stream", [](int device, int stream, int64_t time) {
    StreamState& found = stream_state(device, stream);
    found.busy_until = std::max(found.busy_until, time);
  });
  m.def("sleep", &spin);
  m.def("synchronize", &synchronize, py::call_guard<py::gil_scoped_release>());
  m.def("wait_until", &wait_until, py::call_guard<py::gil_scoped_release>());
  m.def("run_all", [] { run_all(); });
  m.def("raise_if_failed", &raise_if_failed);
  m.def("set_sync_debug_mode", [](int mode) { state().sync_debug_mode = mode; });
  m.def("capturing", [] { return current().capturing; });
  m.def("log", [](const char* name) { log("cuda_runtime", name); });
  m.def("start_profile", [] {
    state().calls.clear();
    state().profiling = true;
  });
  m.def("stop_profile", [] {
    state().profiling = false;
    py::list calls;
    for (const Call& c : state().calls) {
      calls.append(py::make_tuple(c.category, c.name, c.begin, c.end, c.correlation));
    }
    return calls;
  });
  py::class_<Graph>(m, "Graph")
      .def(py::init())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay);
}
