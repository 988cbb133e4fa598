// Loads the kernels on a device, and enqueues a call: a launch that reads all chunks of all
// tensors, one for the chunks of updates if there are any, and one that merges the states of chunks
// if a tensor or an update has several.
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
  Function summarize = nullptr, update = nullptr, merge = nullptr;
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
  if (error.empty()) error = find(&kernels->update, "paramstats_update_chunks");
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

// The entries that were added, and their chunks and groups. A launch has at most 2^31 - 1 blocks.
struct Plan {
  static constexpr int64_t kMaxChunks = 0x7fffffff;
  int64_t entries = 0, chunks = 0, groups = 0;
  int64_t updates = 0, tensor_chunks = 0, update_chunks = 0;

  // Adds a tensor, or a row of an update, and writes its entry unless `out` is null.
  bool add(const TensorView& t, Entry* out) {
    const int64_t count = chunk_count(t.numel, t.dtype);
    if (t.numel <= 0 || count > kMaxChunks - chunks) return false;
    if (out != nullptr) {
      out[entries] = Entry(t, static_cast<uint32_t>(chunks), static_cast<uint32_t>(groups));
    }
    ++entries;
    chunks += count;
    groups += group_count(count);
    return true;
  }

  // Adds an update after all tensors.
  bool add(const UpdateView& u, Entry* out, UpdateEntry* updates_out) {
    if (updates_out != nullptr) {
      updates_out[updates] = {u, static_cast<uint32_t>(update_chunks),
                              static_cast<uint32_t>(entries)};
    }
    for (int row = 0; row < kUpdateRows; ++row) {
      if (!u.has(static_cast<UpdateRow>(row))) continue;
      if (!add({nullptr, u.numel, kUpdateRowDType}, out)) return false;
    }
    ++updates;
    update_chunks += chunk_count(u.numel, kUpdateRowDType);
    return true;
  }

  // Adds everything, up to what cannot be read, for which it returns an error.
  std::string add(const Inputs& inputs, Entry* out, UpdateEntry* updates_out) {
    const auto refuse = [this](int64_t numel, const char* kind, int64_t index) {
      return "expected tensors with elements, of at most " + std::to_string(kMaxChunks) +
             " chunks in all, got " + std::to_string(numel) + " elements in " + kind + " " +
             std::to_string(index) + " after " + std::to_string(chunks) + " chunks";
    };
    for (int64_t t = 0; t < inputs.n; ++t) {
      const TensorView& view = inputs.tensors[t];
      if (!add(view, out)) return refuse(view.numel, "tensor", t);
    }
    tensor_chunks = chunks;
    for (int64_t u = 0; u < inputs.n_updates; ++u) {
      const UpdateView& view = inputs.updates[u];
      if (!add(view, out, updates_out)) return refuse(view.numel, "update", u);
    }
    return "";
  }
};

// Byte offsets in host memory: results, then the table, which are the entries of tensors and rows,
// and those of updates. In device memory: the table, states, counters. What a call does not need
// takes no memory. Everything has multiples of 8 bytes.
struct Offsets {
  int64_t table, updates, host_end;
  int64_t states, merged, device_end;

  Offsets(int64_t entries, int64_t n_updates, const Plan& plan) {
    const bool merges = plan.groups > 0;
    updates = is_inline(entries, n_updates) ? 0 : entries * static_cast<int64_t>(sizeof(Entry));
    states = updates + n_updates * static_cast<int64_t>(sizeof(UpdateEntry));
    merged = states + (merges ? plan.chunks * static_cast<int64_t>(sizeof(Moments)) : 0);
    device_end = merged + (merges ? entries * static_cast<int64_t>(sizeof(uint32_t)) : 0);
    table = entries * static_cast<int64_t>(sizeof(Moments));
    host_end = table + states;
  }

  static bool is_inline(int64_t entries, int64_t n_updates) {
    return n_updates == 0 && entries <= kInlineEntries;
  }
};

int64_t count_entries(const Inputs& inputs) {
  int64_t entries = inputs.n;
  for (int64_t u = 0; u < inputs.n_updates; ++u) {
    for (int row = 0; row < kUpdateRows; ++row) {
      entries += inputs.updates[u].has(static_cast<UpdateRow>(row));
    }
  }
  return entries;
}

std::string enqueue(const Kernels& kernels, const Inputs& inputs, char* host, DevicePointer device,
                    Stream stream) {
  Arguments arguments;  // not initialized: 4 KiB
  const int64_t size = count_entries(inputs);
  const bool is_inline = Offsets::is_inline(size, inputs.n_updates);
  const Offsets on_host(size, inputs.n_updates, Plan());
  auto* entries =
      is_inline ? arguments.inline_entries : reinterpret_cast<Entry*>(host + on_host.table);
  auto* updates = reinterpret_cast<UpdateEntry*>(host + on_host.table + on_host.updates);
  Plan plan;
  if (std::string error = plan.add(inputs, entries, updates); !error.empty()) return error;
  const Offsets offsets(size, inputs.n_updates, plan);

  Current current;
  if (std::string error = current.push(kernels.context); !error.empty()) return error;
  DevicePointer rows;
  PARAMSTATS_TRY(cuMemHostGetDevicePointer_v2, &rows, host, 0)
  arguments.entries = is_inline ? nullptr : reinterpret_cast<const Entry*>(device);
  arguments.rows = reinterpret_cast<Moments*>(rows);
  arguments.states = reinterpret_cast<Moments*>(device + offsets.states);
  arguments.merged = reinterpret_cast<uint32_t*>(device + offsets.merged);
  arguments.size = static_cast<uint32_t>(size);
  arguments.groups = static_cast<uint32_t>(plan.groups);
  UpdateTable update_arguments{arguments, reinterpret_cast<UpdateEntry*>(device + offsets.updates),
                               static_cast<uint32_t>(inputs.n_updates)};
  const auto launch = [stream](Function function, int64_t blocks, unsigned threads,
                               void* argument) -> std::string {
    if (blocks == 0) return "";
    PARAMSTATS_TRY(cuLaunchKernel, function, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, 0,
                   stream, &argument, nullptr)
    return "";
  };
  if (!is_inline) {
    PARAMSTATS_TRY(cuMemcpyHtoDAsync_v2, device, host + offsets.table, offsets.states, stream)
  }
  std::string error = launch(kernels.summarize, plan.tensor_chunks, kThreads, &arguments);
  if (error.empty()) {
    error = launch(kernels.update, plan.update_chunks, kThreads, &update_arguments);
  }
  if (!error.empty()) return error;
  constexpr int kWarps = kMergeThreads / 32;
  return launch(kernels.merge, (plan.groups + kWarps - 1) / kWarps, kMergeThreads, &arguments);
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
  plan.add(inputs, nullptr, nullptr);
  const Offsets offsets(count_entries(inputs), inputs.n_updates, plan);
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
