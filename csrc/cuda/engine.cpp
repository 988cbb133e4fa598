// Loads the kernels on a device, and enqueues a call: copies a table of tensors to the device,
// launches two kernels, copies the results back.
#include "engine.h"

#include <cstring>
#include <vector>

#include "driver.h"

namespace paramstats::cuda {
namespace {

// Byte offsets in host and device memory: first the results, then the table for the kernels. Device
// memory also has the states of all chunks. All sizes are multiples of 8 bytes.
struct Offsets {
  int64_t first_chunk, tensors, states, end;
  explicit Offsets(int64_t n, int64_t chunks) {
    first_chunk = n * static_cast<int64_t>(sizeof(Moments));
    tensors = first_chunk + n * static_cast<int64_t>(sizeof(int64_t));
    states = tensors + n * static_cast<int64_t>(sizeof(TensorView));
    end = states + chunks * static_cast<int64_t>(sizeof(Moments));
  }
};

int64_t total_chunks(const TensorView* tensors, int64_t n) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < n; ++t) chunks += chunk_count(tensors[t]);
  return chunks;
}

// The kernels in the primary context of one device, which torch uses, too.
struct Loaded {
  Context context = nullptr;
  Function summarize = nullptr, merge = nullptr;
};
std::vector<Loaded> devices;  // by index; entries are never removed

// Makes a context current until the end of the scope. (A thread may have none.)
class Current {
 public:
  explicit Current(Context context) : result_(driver.cuCtxPushCurrent_v2(context)) {}
  ~Current() {
    Context popped;
    if (result_ == kSuccess) driver.cuCtxPopCurrent_v2(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  Result result() const { return result_; }

 private:
  Result result_;
};

// Returns the first result that is not kSuccess.
#define PARAMSTATS_TRY(call) \
  if (const Result result = (call); result != kSuccess) return result

Result load(int ordinal, const void* image, Loaded& out) {
  int device;
  PARAMSTATS_TRY(driver.cuDeviceGet(&device, ordinal));
  PARAMSTATS_TRY(driver.cuDevicePrimaryCtxRetain(&out.context, device));
  const Current current(out.context);
  PARAMSTATS_TRY(current.result());
  Library library;
  PARAMSTATS_TRY(
      driver.cuLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0));
  const auto find = [library](const char* name, Function* function) {
    Kernel kernel;
    PARAMSTATS_TRY(driver.cuLibraryGetKernel(&kernel, library, name));
    return driver.cuKernelGetFunction(function, kernel);
  };
  PARAMSTATS_TRY(find("paramstats_summarize_chunks", &out.summarize));
  return find("paramstats_merge_chunks", &out.merge);
}

Result enqueue(const Loaded& kernels, const TensorView* tensors, int64_t n, char* host,
               DevicePointer device, Stream stream) {
  const int64_t chunk_total = total_chunks(tensors, n);
  const Offsets offsets(n, chunk_total);
  auto* first_chunk = reinterpret_cast<int64_t*>(host + offsets.first_chunk);
  int64_t chunks = 0;
  for (int64_t t = 0; t < n; ++t) {
    first_chunk[t] = chunks;
    chunks += chunk_count(tensors[t]);
  }
  std::memcpy(host + offsets.tensors, tensors, n * sizeof(TensorView));

  Table table{reinterpret_cast<const int64_t*>(device + offsets.first_chunk),
              reinterpret_cast<const TensorView*>(device + offsets.tensors), static_cast<int>(n)};
  DevicePointer states = device + offsets.states, rows = device;
  void* chunk_arguments[] = {&table, &states};
  void* merge_arguments[] = {&table, &states, &rows};
  const Current current(kernels.context);
  PARAMSTATS_TRY(current.result());
  PARAMSTATS_TRY(driver.cuMemcpyHtoDAsync_v2(device + offsets.first_chunk,
                                             host + offsets.first_chunk,
                                             offsets.states - offsets.first_chunk, stream));
  if (chunk_total > 0) {
    PARAMSTATS_TRY(driver.cuLaunchKernel(kernels.summarize, static_cast<unsigned>(chunk_total), 1,
                                         1, kThreads, 1, 1, 0, stream, chunk_arguments, nullptr));
  }
  PARAMSTATS_TRY(driver.cuLaunchKernel(kernels.merge, static_cast<unsigned>(n), 1, 1, kMergeThreads,
                                       1, 1, 0, stream, merge_arguments, nullptr));
  return driver.cuMemcpyDtoHAsync_v2(host, device, offsets.first_chunk, stream);
}

}  // namespace

std::string load(int device, const void* image) {
  Loaded loaded;
  const int mode = exchange_capture_mode(kRelaxedCapture);
  const Result result = load(device, image, loaded);
  exchange_capture_mode(mode);
  if (result != kSuccess) return text_of(result);
  if (devices.size() <= static_cast<size_t>(device)) devices.resize(device + 1);
  devices[device] = loaded;
  return "";
}

int exchange_capture_mode(int mode) {
  driver.cuThreadExchangeStreamCaptureMode(&mode);
  return mode;
}

Sizes sizes(const TensorView* tensors, int64_t n) {
  const Offsets offsets(n, total_chunks(tensors, n));
  return {offsets.states, offsets.end};
}

std::string enqueue(int device, const TensorView* tensors, int64_t n, void* host,
                    void* device_memory, Stream stream) {
  return text_of(enqueue(devices.at(device), tensors, n, static_cast<char*>(host),
                         reinterpret_cast<DevicePointer>(device_memory), stream));
}

}  // namespace paramstats::cuda
