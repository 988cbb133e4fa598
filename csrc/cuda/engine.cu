// Enqueues a call: copies a table of tensors to the device, launches two kernels, copies the
// results back.
#include <cuda_runtime.h>

#include <cstring>

#include "engine.h"
#include "kernels.h"

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

// The message of an error, or null. Also clears CUDA's last error, which another library would
// read.
const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Whether the kernels can never run on this device. Other errors may be temporary; the call itself
// reports them.
bool is_permanent(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled: return true;
    default: return false;
  }
}

}  // namespace

// Also loads both kernels, which CUDA would otherwise do at their first launches.
const char* check() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, paramstats_summarize_chunks);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, paramstats_merge_chunks);
  const char* message = message_of(error);
  return is_permanent(error) ? message : nullptr;
}

int exchange_capture_mode(int mode) {
  static_assert(kRelaxedCapture == cudaStreamCaptureModeRelaxed, "the value of CUDA's enum");
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  cudaThreadExchangeStreamCaptureMode(&exchanged);
  return exchanged;
}

Sizes sizes(const TensorView* tensors, int64_t n) {
  const Offsets offsets(n, total_chunks(tensors, n));
  return {offsets.states, offsets.end};
}

const char* enqueue(const TensorView* tensors, int64_t n, void* host_memory, void* device_memory,
                    void* raw_stream) {
  const int64_t chunk_total = total_chunks(tensors, n);
  const Offsets offsets(n, chunk_total);
  auto* host = static_cast<char*>(host_memory);
  auto* device = static_cast<char*>(device_memory);
  auto stream = static_cast<cudaStream_t>(raw_stream);

  auto* first_chunk = reinterpret_cast<int64_t*>(host + offsets.first_chunk);
  int64_t chunks = 0;
  for (int64_t t = 0; t < n; ++t) {
    first_chunk[t] = chunks;
    chunks += chunk_count(tensors[t]);
  }
  std::memcpy(host + offsets.tensors, tensors, n * sizeof(TensorView));

  Table table{reinterpret_cast<const int64_t*>(device + offsets.first_chunk),
              reinterpret_cast<const TensorView*>(device + offsets.tensors), static_cast<int>(n)};
  auto* states = reinterpret_cast<Moments*>(device + offsets.states);
  auto* rows = reinterpret_cast<Moments*>(device);
  void* chunk_arguments[] = {&table, &states};
  void* merge_arguments[] = {&table, &states, &rows};

  cudaError_t error =
      cudaMemcpyAsync(device + offsets.first_chunk, host + offsets.first_chunk,
                      offsets.states - offsets.first_chunk, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess && chunk_total > 0) {
    error = cudaLaunchKernel(paramstats_summarize_chunks, dim3(static_cast<unsigned>(chunk_total)),
                             dim3(kThreads), chunk_arguments, 0, stream);
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(paramstats_merge_chunks, dim3(static_cast<unsigned>(n)),
                             dim3(kMergeThreads), merge_arguments, 0, stream);
  }
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(host, device, offsets.first_chunk, cudaMemcpyDeviceToHost, stream);
  }
  return message_of(error);
}

}  // namespace paramstats::cuda
