// Parts of the fake CUDA device (fake_device.cpp): clocks of streams, a log of calls, the driver.
#pragma once

#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fake_device {

constexpr int kDevices = 2;
constexpr int kMaxStreams = 64;  // per device; the first is the default stream

inline int64_t now() {  // nanoseconds since 1970, as torch's profiler counts
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// The parts of fake_driver.cpp. Enqueued kernels run in run_all(), which runs all of them.
void run_all();
void* new_stream(int device);
void set_capturing(void* stream, bool capturing);

constexpr int64_t kWorkNanoseconds = 1000;  // time that a kernel or a copy seems to take

// Work on a stream ends at `busy_until`. Torch operators run at once; only _sleep() takes time.
struct StreamState {
  void* handle = nullptr;
  int64_t busy_until = 0;
  bool capturing = false;
};

struct Call {  // for the profiler
  std::string category, name;
  int64_t begin, end, correlation;
};

struct State {
  std::mutex mutex;
  StreamState streams[kDevices][kMaxStreams];
  int stream_count[kDevices] = {1, 1};
  bool failed = false;      // a device assertion has failed
  int sync_debug_mode = 0;  // 2: calls that wait are errors
  bool profiling = false;
  std::vector<Call> calls;
  int64_t correlation = 0;

  StreamState& of(c10::Stream s) { return streams[s.device_index()][s.id()]; }
};
inline State& state() {
  static State* state = new State;  // used after the end of main by destructors of tensors
  return *state;
}

inline thread_local int current_device = 0;
inline thread_local int current_stream[kDevices] = {};

inline c10::Stream stream_of(int device) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, static_cast<int8_t>(device)),
                     current_stream[device]);
}
inline StreamState& current() { return state().of(stream_of(current_device)); }

inline c10::Device cuda(int device) { return {c10::kCUDA, static_cast<int8_t>(device)}; }

inline void raise_if_failed() {
  if (state().failed) throw std::runtime_error("CUDA error: device-side assert triggered");
}

// Counts work on a stream as time.
inline void add_work(StreamState& stream, int64_t nanoseconds = kWorkNanoseconds) {
  stream.busy_until = std::max(stream.busy_until, now()) + nanoseconds;
}

// Records a call of CUDA and, if `work` is not empty, work on the device.
inline void log(const char* category, const std::string& name, const char* work_category = "",
                const std::string& work = "") {
  State& s = state();
  if (!s.profiling) return;
  const std::lock_guard<std::mutex> lock(s.mutex);
  const int64_t begin = now(), correlation = ++s.correlation;
  if (!name.empty())
    s.calls.push_back({category, name, begin, begin + kWorkNanoseconds, correlation});
  if (!work.empty())
    s.calls.push_back({work_category, work, begin, begin + kWorkNanoseconds, correlation});
}

// Waits until a time; the work that was enqueued before it is then done.
inline void wait_until(int64_t time) {
  raise_if_failed();
  while (now() < time) std::this_thread::sleep_for(std::chrono::microseconds(200));
  run_all();
}

// Waits for a stream in an operator that cannot do without, such as item().
inline void wait_for(c10::Stream stream, const char* what) {
  if (state().sync_debug_mode == 2) {
    throw std::runtime_error(std::string("called a synchronizing CUDA operation: ") + what);
  }
  log("cuda_runtime", "cudaStreamSynchronize");
  wait_until(state().of(stream).busy_until);
}

// ---- fake_device.cpp -----------------------------------------------------------------------

// Returns device memory that is the memory of a CPU storage.
c10::DataPtr as_device_memory(const c10::Storage& cpu, c10::Device device);
c10::Allocator* device_allocator();

// ---- operators.cpp -------------------------------------------------------------------------

// The operators that were called on the current stream between begin() and end().
class Graph {
 public:
  struct Calls;
  Graph();
  void begin();
  void end();
  void replay() const;

 private:
  std::shared_ptr<Calls> calls_;
};

}  // namespace fake_device
