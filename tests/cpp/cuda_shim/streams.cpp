// Streams and events: enqueued work runs when the program synchronizes. Also errors on demand.
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "internal.h"

struct CUstream_st {
  std::deque<std::function<void()>> queue;
  int device = 0;
  bool capturing = false;
};

namespace cuda_shim {
namespace {

struct Record {  // of an event: a position in a stream's queue
  cudaStream_t stream;
  bool done;
};

std::recursive_mutex mutex;
CUstream_st default_streams[kDevices];
std::vector<cudaStream_t> streams;  // created by cudaStreamCreate; never destroyed
int64_t call_count, launch_count, copy_count, synchronization_count;
bool invalidated;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
cudaError_t planned_error = cudaSuccess;
int planned_skip;
thread_local int device;
thread_local cudaError_t last_error = cudaSuccess;

// Runs `body`, which implements a runtime call that can fail.
template <class Body>
cudaError_t call(Body&& body) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  ++call_count;
  cudaError_t error = cudaSuccess;
  if (planned_error != cudaSuccess && planned_skip-- == 0) std::swap(error, planned_error);
  if (error == cudaSuccess) error = body();
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaStream_t resolve(cudaStream_t stream) {
  return stream != nullptr ? stream : &default_streams[device];
}

// Runs `body(stream)`, which implements a call that fails while the stream is being captured.
template <class Body>
cudaError_t call_on(cudaStream_t stream, Body&& body) {
  return call([&] {
    stream = resolve(stream);
    if (!stream->capturing) return body(stream);
    invalidated = true;
    return cudaErrorStreamCaptureUnsupported;
  });
}

// Runs the enqueued work, up to a record if one is given.
void advance(cudaStream_t stream, const Record* until = nullptr) {
  while (until != nullptr ? !until->done : !stream->queue.empty()) {
    const std::function<void()> work = std::move(stream->queue.front());
    stream->queue.pop_front();
    work();
  }
}

// While any stream is being captured, a query of an event invalidates the capture, unless this
// thread has chosen another capture mode.
bool query_invalidates_capture() {
  bool any = false;
  for (const CUstream_st& stream : default_streams) any = any || stream.capturing;
  for (cudaStream_t stream : streams) any = any || stream->capturing;
  const bool invalidates = any && capture_mode == cudaStreamCaptureModeGlobal;
  invalidated = invalidated || invalidates;
  return invalidates;
}

}  // namespace

void run_all() {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  for (CUstream_st& stream : default_streams) advance(&stream);
  for (cudaStream_t stream : streams) advance(stream);
}

int exchange_device(int next) {
  default_streams[next].device = next;
  return std::exchange(device, next);
}

void set_capturing(cudaStream_t stream, bool capturing) {
  resolve(stream)->capturing = capturing;
  invalidated = false;
}
bool capture_invalidated() { return invalidated; }

void fail_next(cudaError_t error, int skip) {
  planned_error = error;
  planned_skip = skip;
}

std::function<void()> before_launch;

int64_t calls() { return call_count; }
int64_t launches() { return launch_count; }
int64_t copies() { return copy_count; }
int64_t synchronizations() { return synchronization_count; }

cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::function<void()> body) {
  if (const auto hook = std::exchange(before_launch, nullptr)) hook();
  return call_on(stream, [&](cudaStream_t queue) {
    const bool is_1d = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
    if (!is_1d || grid.x < 1 || grid.x > 0x7fffffffu || block.x < 1 || block.x > kMaxThreads ||
        shared != 0) {
      return cudaErrorInvalidConfiguration;
    }
    if (queue->device != device) return cudaErrorInvalidResourceHandle;
    queue->queue.push_back(
        [grid, block, body = std::move(body)] { run_kernel(grid, block, body); });
    ++launch_count;
    return cudaSuccess;
  });
}

cudaError_t succeed() {
  return call([] { return cudaSuccess; });
}

}  // namespace cuda_shim

using namespace cuda_shim;

struct CUevent_st {
  std::shared_ptr<Record> last;
};

const char* cudaGetErrorString(cudaError_t error) {
#define CUDA_SHIM_NAME(name, number) \
  if (error == name) return #name;
  CUDA_SHIM_ERRORS(CUDA_SHIM_NAME)
#undef CUDA_SHIM_NAME
  return "unrecognized error code";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* result) {
  return call([&] {
    *result = device;
    return cudaSuccess;
  });
}
cudaError_t cudaSetDevice(int wanted) {
  return call([&] {
    if (wanted < 0 || wanted >= kDevices) return cudaErrorInvalidDevice;
    exchange_device(wanted);
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return call_on(stream, [&](cudaStream_t queue) {
    queue->queue.push_back([=] { std::memcpy(to, from, bytes); });
    ++copy_count;
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return call_on(stream, [&](cudaStream_t queue) {
    queue->queue.push_back([=] {
      if (bytes > 0) std::memset(to, value, bytes);
    });
    return cudaSuccess;
  });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return call([&] {
    *stream = new CUstream_st;
    (*stream)->device = device;
    streams.push_back(*stream);
    return cudaSuccess;
  });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call_on(stream, [](cudaStream_t queue) {
    advance(queue);
    ++synchronization_count;
    return cudaSuccess;
  });
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return call_on(stream, [](cudaStream_t queue) {
    return queue->queue.empty() ? cudaSuccess : cudaErrorNotReady;
  });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call([&] {
    *status =
        resolve(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
  });
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call_on(stream, [&](cudaStream_t queue) {
    if (event->last != nullptr) {
      queue->queue.push_back([last = event->last] { advance(last->stream, last.get()); });
    }
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return call([&] {
    *event = new CUevent_st;
    return cudaSuccess;
  });
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call([&] {
    delete event;
    return cudaSuccess;
  });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call_on(stream, [&](cudaStream_t queue) {
    event->last = std::make_shared<Record>(Record{queue, false});
    queue->queue.push_back([last = event->last] { last->done = true; });
    return cudaSuccess;
  });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call([&] {
    if (query_invalidates_capture()) return cudaErrorStreamCaptureUnsupported;
    return event->last == nullptr || event->last->done ? cudaSuccess : cudaErrorNotReady;
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call([&] {
    if (query_invalidates_capture()) return cudaErrorStreamCaptureUnsupported;
    if (event->last != nullptr) advance(event->last->stream, event->last.get());
    ++synchronization_count;
    return cudaSuccess;
  });
}
