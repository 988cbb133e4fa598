// Loads the kernels on a device, and enqueues a call: one launch that reads all chunks of all
// tensors, and a second one if a tensor has several chunks, whose states it merges.
#include "engine.h"

#include <map>
#include <mutex>
#include <utility>

#include "driver.h"

namespace paramstats::cuda {
namespace {

// ---- devices -----------------------------------------------------------------------------------

// The kernels in the primary context of one device, which torch uses, too.
struct Kernels {
  Context context = nullptr;
  Function summarize = nullptr, merge = nullptr;
};
struct Device {
  int handle = 0;
  Kernels kernels;  // if error is empty
  std::string error;
};
std::mutex mutex;               // of `devices`
std::map<int, Device> devices;  // by ordinal

// Calls a function of the driver. Returns the text of an error from the function that uses this.
#define PARAMSTATS_TRY(function, ...)                                           \
  if (const Result result = driver.function(__VA_ARGS__); result != kSuccess) { \
    return text_of(#function, result);                                          \
  }

// Makes a context current until the end of the scope. (A thread may have none.)
class Current {
 public:
  std::string push(Context context) {
    PARAMSTATS_TRY(cuCtxPushCurrent_v2, context)
    pushed_ = true;
    return "";
  }
  ~Current() {
    Context popped;
    if (pushed_) driver.cuCtxPopCurrent_v2(&popped);
  }

 private:
  bool pushed_ = false;
};

std::string load_image(const void* image, Kernels* kernels) {
  Current current;
  if (std::string error = current.push(kernels->context); !error.empty()) return error;
  Module module;
  PARAMSTATS_TRY(cuModuleLoadData, &module, image)
  const auto find = [module](Function* function, const char* name) -> std::string {
    PARAMSTATS_TRY(cuModuleGetFunction, function, module, name)  // CUDA may load it only now
    return "";
  };
  std::string error = find(&kernels->summarize, "paramstats_summarize_chunks");
  if (error.empty()) error = find(&kernels->merge, "paramstats_merge_chunks");
  if (!error.empty()) driver.cuModuleUnload(module);
  return error;
}

// Keeps a reference to the primary context if it succeeds.
std::string load_on(int ordinal, const void* image, Device* device) {
  PARAMSTATS_TRY(cuDeviceGet, &device->handle, ordinal)
  PARAMSTATS_TRY(cuDevicePrimaryCtxRetain, &device->kernels.context, device->handle)
  std::string error = load_image(image, &device->kernels);
  if (!error.empty()) driver.cuDevicePrimaryCtxRelease_v2(device->handle);
  return error;
}

std::string find_kernels(int ordinal, Kernels* kernels) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(ordinal);
  if (found != devices.end() && found->second.error.empty()) {
    *kernels = found->second.kernels;
    return "";
  }
  return "expected a device with kernels, got device " + std::to_string(ordinal) + ": " +
         (found == devices.end() ? "no image was loaded" : found->second.error);
}

// ---- the plan of a call ------------------------------------------------------------------------

// The chunks and groups of the tensors that were added. A launch has at most 2^31 - 1 blocks.
struct Plan {
  static constexpr int64_t kMaxChunks = 0x7fffffff;
  int64_t chunks = 0, groups = 0;

  bool add(const TensorView& t) {
    const int64_t count = chunk_count(t.numel, t.dtype);
    if (t.numel <= 0 || count > kMaxChunks - chunks) return false;
    chunks += count;
    groups += group_count(count);
    return true;
  }
};

// Byte offsets in host memory: results, then entries. In device memory: entries, states, counters.
// What a call does not need takes no memory. Results, entries and states have multiples of 8 bytes.
struct Offsets {
  int64_t entries, host_end;
  int64_t states, merged, device_end;

  explicit Offsets(int64_t n, const Plan& plan) {
    const bool merges = plan.groups > 0;
    states = n > kInlineEntries ? n * static_cast<int64_t>(sizeof(Entry)) : 0;
    merged = states + (merges ? plan.chunks * static_cast<int64_t>(sizeof(Moments)) : 0);
    device_end = merged + (merges ? n * static_cast<int64_t>(sizeof(uint32_t)) : 0);
    entries = n * static_cast<int64_t>(sizeof(Moments));
    host_end = entries + states;
  }
};

std::string enqueue(const Kernels& kernels, const TensorView* tensors, int64_t n, char* host,
                    DevicePointer device, Stream stream) {
  Arguments arguments;  // not initialized: 4 KiB
  const bool is_inline = n <= kInlineEntries;
  auto* entries = is_inline ? arguments.inline_entries
                            : reinterpret_cast<Entry*>(host + Offsets(n, Plan()).entries);
  Plan plan;
  for (int64_t t = 0; t < n; ++t) {
    entries[t] =
        Entry(tensors[t], static_cast<uint32_t>(plan.chunks), static_cast<uint32_t>(plan.groups));
    if (!plan.add(tensors[t])) {
      return "expected tensors with elements, of at most " + std::to_string(Plan::kMaxChunks) +
             " chunks in all, got " + std::to_string(tensors[t].numel) + " elements in tensor " +
             std::to_string(t) + " after " + std::to_string(plan.chunks) + " chunks";
    }
  }
  const Offsets offsets(n, plan);

  Current current;
  if (std::string error = current.push(kernels.context); !error.empty()) return error;
  DevicePointer rows;
  PARAMSTATS_TRY(cuMemHostGetDevicePointer_v2, &rows, host, 0)
  arguments.entries = is_inline ? nullptr : reinterpret_cast<const Entry*>(device);
  arguments.rows = reinterpret_cast<Moments*>(rows);
  arguments.states = reinterpret_cast<Moments*>(device + offsets.states);
  arguments.merged = reinterpret_cast<uint32_t*>(device + offsets.merged);
  arguments.tensors = static_cast<uint32_t>(n);
  arguments.groups = static_cast<uint32_t>(plan.groups);
  void* pointers[] = {&arguments};
  const auto launch = [&](Function function, int64_t blocks, unsigned threads) -> std::string {
    PARAMSTATS_TRY(cuLaunchKernel, function, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, 0,
                   stream, pointers, nullptr)
    return "";
  };
  if (!is_inline) {
    PARAMSTATS_TRY(cuMemcpyHtoDAsync_v2, device, entries, offsets.states, stream)
  }
  if (std::string error = launch(kernels.summarize, plan.chunks, kThreads); !error.empty()) {
    return error;
  }
  if (plan.groups == 0) return "";
  constexpr int kWarps = kMergeThreads / 32;
  return launch(kernels.merge, (plan.groups + kWarps - 1) / kWarps, kMergeThreads);
}

}  // namespace

// ---- the interface -----------------------------------------------------------------------------

std::string load(int device, const void* image) {
  Device loaded;
  const int mode = exchange_capture_mode(kRelaxedCapture);
  loaded.error = load_on(device, image, &loaded);
  exchange_capture_mode(mode);
  std::string error = loaded.error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_first] = devices.try_emplace(device);
  if (!is_first && found->second.error.empty() && !error.empty()) return error;
  std::swap(found->second, loaded);
  // An earlier image is not unloaded, because its kernels may be running.
  if (!is_first && loaded.error.empty()) driver.cuDevicePrimaryCtxRelease_v2(loaded.handle);
  return error;
}

int exchange_capture_mode(int mode) {
  driver.cuThreadExchangeStreamCaptureMode(&mode);
  return mode;
}

Sizes sizes(const TensorView* tensors, int64_t n) {
  Plan plan;
  for (int64_t t = 0; t < n && plan.add(tensors[t]); ++t) continue;
  const Offsets offsets(n, plan);
  return {offsets.host_end, offsets.device_end};
}

std::string enqueue(int device, const TensorView* tensors, int64_t n, void* host,
                    void* device_memory, Stream stream) {
  Kernels kernels;
  if (std::string error = find_kernels(device, &kernels); !error.empty()) return error;
  return enqueue(kernels, tensors, n, static_cast<char*>(host),
                 reinterpret_cast<DevicePointer>(device_memory), stream);
}

}  // namespace paramstats::cuda
