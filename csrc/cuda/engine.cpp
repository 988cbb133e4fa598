// Loads the kernels on a device, and enqueues a call: a launch that reads all chunks of all
// tensors, one for the chunks of updates if there are any, and one that merges the states of chunks
// if a tensor or an update has several. Distributions, where they are asked for, need two more.
#include "engine.h"

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "driver.h"
#include "plan.h"

namespace paramstats::cuda {
namespace {

// ---- devices -----------------------------------------------------------------------------------

// The kernels in the primary context of one device, which torch uses, too.
struct Kernels {
  Context context = nullptr;
  Function summarize = nullptr, update = nullptr, merge = nullptr;
  Function distribution = nullptr, merge_distributions = nullptr;
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
  const std::pair<Function*, const char*> names[] = {
      {&kernels->summarize, "paramstats_summarize_chunks"},
      {&kernels->update, "paramstats_update_chunks"},
      {&kernels->merge, "paramstats_merge_chunks"},
      {&kernels->distribution, "paramstats_distribution_chunks"},
      {&kernels->merge_distributions, "paramstats_merge_distributions"}};
  std::string error;
  for (const auto& [function, name] : names) {
    if (error.empty()) error = find(function, name);
  }
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

// ---- a call ------------------------------------------------------------------------------------

std::string enqueue(const Kernels& kernels, const Inputs& inputs, char* host, DevicePointer device,
                    Stream stream) {
  Plan plan;
  if (std::string error = plan.add(inputs, nullptr, nullptr, nullptr); !error.empty()) return error;
  const Offsets offsets(inputs, plan);
  Arguments arguments;  // not initialized: 4 KiB
  const bool is_inline = Offsets::is_inline(plan);
  char* table = host + offsets.table;
  const Plan::Details details = {
      reinterpret_cast<ZeroRowsEntry*>(host + offsets.zero_rows),
      reinterpret_cast<DistributionEntry*>(table + offsets.distribution_entries), offsets.flags,
      offsets.words, offsets.distributions};
  Plan().add(inputs, is_inline ? arguments.inline_entries : reinterpret_cast<Entry*>(table),
             reinterpret_cast<UpdateEntry*>(table + offsets.updates), &details);
  std::memset(host + offsets.flags, kNoPartZero, offsets.words - offsets.flags);

  Current current;
  if (std::string error = current.push(kernels.context); !error.empty()) return error;
  DevicePointer rows;
  PARAMSTATS_TRY(cuMemHostGetDevicePointer_v2, &rows, host, 0)
  arguments.entries = is_inline ? nullptr : reinterpret_cast<const Entry*>(device);
  arguments.rows = reinterpret_cast<Moments*>(rows);
  arguments.states = reinterpret_cast<Moments*>(device + offsets.states);
  arguments.merged = reinterpret_cast<uint32_t*>(device + offsets.merged);
  arguments.size = static_cast<uint32_t>(plan.entries);
  arguments.groups = static_cast<uint32_t>(plan.groups);
  UpdateTable update_arguments{arguments, reinterpret_cast<UpdateEntry*>(device + offsets.updates),
                               static_cast<uint32_t>(inputs.n_updates)};
  DistributionTable distribution_arguments{
      arguments, reinterpret_cast<DistributionEntry*>(device + offsets.distribution_entries),
      static_cast<uint32_t>(plan.distributions),
      reinterpret_cast<HigherMoments*>(device + offsets.moments),
      reinterpret_cast<unsigned long long*>(device + offsets.counts)};
  if (offsets.table_end > 0) {
    PARAMSTATS_TRY(cuMemcpyHtoDAsync_v2, device, table, offsets.table_end, stream)
  }
  if (plan.counts > 0) {
    PARAMSTATS_TRY(cuMemsetD8Async, device + offsets.counts, 0, plan.counts * 8, stream)
  }
  constexpr int kWarps = kMergeThreads / 32;
  const struct {
    Function function;
    int64_t blocks;
    unsigned threads;
    void* argument;
  } launches[] = {
      {kernels.summarize, plan.tensor_chunks, kThreads, &arguments},
      {kernels.update, plan.update_chunks, kThreads, &update_arguments},
      {kernels.distribution, plan.spans, kThreads, &distribution_arguments},  // needs the states,
      {kernels.merge, (plan.groups + kWarps - 1) / kWarps, kMergeThreads, &arguments},  // before
      {kernels.merge_distributions, plan.distributions, kThreads, &distribution_arguments},
  };
  for (auto launch : launches) {
    if (launch.blocks == 0) continue;
    PARAMSTATS_TRY(cuLaunchKernel, launch.function, static_cast<unsigned>(launch.blocks), 1, 1,
                   launch.threads, 1, 1, 0, stream, &launch.argument, nullptr)
  }
  return "";
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

Sizes sizes(const Inputs& inputs) {
  Plan plan;
  plan.add(inputs, nullptr, nullptr, nullptr);
  const Offsets offsets(inputs, plan);
  return {offsets.host_end, offsets.device_end};
}

std::string enqueue(int device, const Inputs& inputs, void* host, void* device_memory,
                    Stream stream) {
  Kernels kernels;
  if (std::string error = find_kernels(device, &kernels); !error.empty()) return error;
  return enqueue(kernels, inputs, static_cast<char*>(host),
                 reinterpret_cast<DevicePointer>(device_memory), stream);
}

}  // namespace paramstats::cuda
