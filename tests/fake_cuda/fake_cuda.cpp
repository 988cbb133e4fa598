// The C++ part of the fake CUDA (building.py): tensors that report a CUDA device, pinned memory,
// streams and events, on the runtime of tests/cpp/cuda_shim.
//
// Enqueued work runs only when the program waits for it or calls run(). Freed memory is overwritten
// as early as torch's caching allocators would reuse it. Code that reads it too late reads garbage.
#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>
#include <pybind11/functional.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kDevices = 2;
constexpr int kStreams = 4;  // per device; the first is the default stream
constexpr int kGarbage = 0xa5;

int allocations = 0, recorded = 0;
int pinned = 0;                  // blocks of pinned memory that are in use
bool device_has_failed = false;  // a permanent error

struct Streams {
  cudaStream_t handles[kDevices][kStreams] = {};
  int current[kDevices] = {};
  Streams() {
    for (int d = 0; d < kDevices; ++d) {
      cudaSetDevice(d);
      for (int s = 1; s < kStreams; ++s) cudaStreamCreate(&handles[d][s]);
    }
    cudaSetDevice(0);
  }
  cudaStream_t of(int device) const { return handles[device][current[device]]; }
};
Streams streams;

int current_device() {
  int device;
  cudaGetDevice(&device);
  return device;
}

int exchange_device(int device) {
  const int before = current_device();
  cudaSetDevice(device);
  return before;
}

// ---- memory --------------------------------------------------------------------------------

struct Block {
  std::vector<unsigned char> memory;
  bool is_host;
  int device;
  cudaStream_t owner;
  std::vector<cudaStream_t> recorded;
};

// The memory of pinned blocks is reused at once: torch does not know about our copies. That of
// others is reused in the order of the stream on which it was allocated, after those on which it
// was recorded.
void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  if (block->is_host) {
    --pinned;
    std::memset(block->memory.data(), kGarbage, block->memory.size());
  } else {
    const int before = exchange_device(block->device);
    for (cudaStream_t stream : block->recorded) {
      cudaEvent_t event;
      cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      cudaEventRecord(event, stream);
      cudaStreamWaitEvent(block->owner, event);
    }
    cudaMemsetAsync(block->memory.data(), kGarbage, block->memory.size(), block->owner);
    cudaSetDevice(before);
  }
  // The block itself is leaked: the memory must stay readable.
}

// Returns a tensor with uninitialized memory on a device, or pinned memory.
at::Tensor empty(size_t bytes, bool is_host, int device, caffe2::TypeMeta dtype) {
  auto* block = new Block{
      std::vector<unsigned char>(bytes, kGarbage), is_host, device, streams.of(device), {}};
  ++allocations;
  pinned += is_host;
  const c10::Device where =
      is_host ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, static_cast<int8_t>(device));
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       c10::DataPtr(block->memory.data(), block, free_block, where));
  const auto key = is_host ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  auto impl =
      c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), dtype);
  impl->set_sizes_contiguous({static_cast<int64_t>(bytes / dtype.itemsize())});
  return at::Tensor(std::move(impl));
}

// Copies a CPU tensor to a device, with the same storage, sizes and strides.
at::Tensor to(const at::Tensor& cpu, int device) {
  at::Tensor copy = empty(cpu.storage().nbytes(), false, device, cpu.dtype());
  std::memcpy(copy.storage().mutable_data(), cpu.storage().data(), cpu.storage().nbytes());
  c10::TensorImpl& impl = *copy.unsafeGetTensorImpl();
  impl.set_storage_offset(cpu.storage_offset());
  impl.set_sizes_and_strides(cpu.sizes(), cpu.strides());
  return copy;
}

// Another tensor of another dtype, with the same memory and number of elements.
at::Tensor as_dtype(const at::Tensor& tensor, at::ScalarType dtype) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::Storage(tensor.storage()), tensor.key_set(),
                                                   c10::scalarTypeToTypeMeta(dtype));
  impl->set_sizes_contiguous({tensor.numel()});
  return at::Tensor(std::move(impl));
}

void record_stream(const at::Tensor& tensor, uintptr_t stream) {
  if (!tensor.is_cuda()) throw std::runtime_error("record_stream of a tensor that is not on CUDA");
  auto* block = static_cast<Block*>(tensor.storage().data_ptr().get_context());
  const auto handle = reinterpret_cast<cudaStream_t>(stream);
  if (handle != block->owner) block->recorded.push_back(handle);
  ++recorded;
}

// ---- events --------------------------------------------------------------------------------

struct Event {
  cudaEvent_t event;
  Event() { cudaEventCreateWithFlags(&event, cudaEventDisableTiming); }
  ~Event() { cudaEventDestroy(event); }
  static bool check(cudaError_t error) {
    if (error == cudaErrorNotReady && !device_has_failed) return false;
    if (error == cudaSuccess && !device_has_failed) return true;
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
  }
  bool query() const { return check(cudaEventQuery(event)); }
  void synchronize() const { check(cudaEventSynchronize(event)); }
  void record(uintptr_t stream) {
    check(cudaEventRecord(event, reinterpret_cast<cudaStream_t>(stream)));
  }
};

bool is_capturing() {
  cudaStreamCaptureStatus status;
  cudaStreamIsCapturing(streams.of(current_device()), &status);
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<Event>(m, "Event")
      .def(py::init())
      .def("record", &Event::record)
      .def("query", &Event::query)
      .def("synchronize", &Event::synchronize);
  m.def("current_device", &current_device);
  m.def("exchange_device", &exchange_device);
  m.def("stream", [](int device) { return reinterpret_cast<uintptr_t>(streams.of(device)); });
  m.def("use_stream", [](int device, int stream) { streams.current[device] = stream; });
  m.def("is_capturing", &is_capturing);
  m.def("empty", [](size_t bytes, int device) {
    return empty(bytes, false, device, caffe2::TypeMeta::Make<uint8_t>());
  });
  m.def("empty_pinned", [](size_t bytes) {
    Event().query();  // torch's allocator may do what invalidates a capture by another thread
    return empty(bytes, true, current_device(), caffe2::TypeMeta::Make<uint8_t>());
  });
  m.def("to", &to);
  m.def("as_dtype", &as_dtype);
  m.def("record_stream", &record_stream);
  m.def("set_capturing", [](int device, int stream, bool capturing) {
    cuda_shim::set_capturing(streams.handles[device][stream], capturing);
  });
  m.def("capture_invalidated", &cuda_shim::capture_invalidated);
  m.def("run", &cuda_shim::run_all);
  m.def("fail_next",
        [](int error, int skip) { cuda_shim::fail_next(static_cast<cudaError_t>(error), skip); });
  m.def("before_launch", [](std::function<void()> call) {
    cuda_shim::before_launch = [call = std::move(call)] {
      const py::gil_scoped_acquire acquire;
      call();
    };
  });
  m.def("pinned", [] { return pinned; });
  m.def("fail", [](bool failed) { device_has_failed = failed; });
  m.def("counts", [] {
    py::dict counts;
    counts["launches"] = cuda_shim::launches();
    counts["copies"] = cuda_shim::copies();
    counts["waits"] = cuda_shim::synchronizations();
    counts["allocations"] = allocations;
    counts["recorded"] = recorded;
    return counts;
  });
}
