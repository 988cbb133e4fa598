// Lays the table of a call out, has it copied, the two kernels run and the results copied back.
#include <cuda_runtime.h>

#include <cstring>

#include "engine.h"
#include "kernels.h"

namespace paramstats::cuda {
namespace {

// Where things are in either memory: the results, then the table that the kernels are given; on the
// device also the chunks' states. Everything is a multiple of 8 bytes long.
struct Places {
  int64_t first_chunk, tensors, states, end;
  explicit Places(int64_t n, int64_t chunks) {
    first_chunk = n * static_cast<int64_t>(sizeof(Moments));
    tensors = first_chunk + n * static_cast<int64_t>(sizeof(int64_t));
    states = tensors + n * static_cast<int64_t>(sizeof(TensorView));
    end = states + chunks * static_cast<int64_t>(sizeof(Moments));
  }
};

int64_t chunks_of_all(const TensorView* tensors, int64_t n) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < n; ++t) chunks += chunk_count(tensors[t]);
  return chunks;
}

// The error's text, and nothing left of it for somebody else's next call.
const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

const char* check() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, paramstats_summarize_chunks);
  const char* text = text_of(error);
  // Whatever else is wrong is not so for ever, and the call itself will tell.
  const bool never =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  return never ? text : nullptr;
}

const char* is_capturing(void* stream, bool& capturing) {
  cudaStreamCaptureStatus status;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  capturing = error == cudaSuccess && status != cudaStreamCaptureStatusNone;
  return text_of(error);
}

int exchange_capture_mode(int mode) {
  static_assert(kRelaxedCapture == cudaStreamCaptureModeRelaxed, "as CUDA numbers them");
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  cudaThreadExchangeStreamCaptureMode(&exchanged);
  return exchanged;
}

Sizes sizes(const TensorView* tensors, int64_t n) {
  const Places places(n, chunks_of_all(tensors, n));
  return {places.states, places.end};
}

const char* enqueue(const TensorView* tensors, int64_t n, void* host_memory, void* device_memory,
                    void* raw_stream) {
  const int64_t all_chunks = chunks_of_all(tensors, n);
  const Places places(n, all_chunks);
  auto* host = static_cast<char*>(host_memory);
  auto* device = static_cast<char*>(device_memory);
  auto stream = static_cast<cudaStream_t>(raw_stream);

  auto* first_chunk = reinterpret_cast<int64_t*>(host + places.first_chunk);
  int64_t chunks = 0;
  for (int64_t t = 0; t < n; ++t) {
    first_chunk[t] = chunks;
    chunks += chunk_count(tensors[t]);
  }
  std::memcpy(host + places.tensors, tensors, n * sizeof(TensorView));

  Table table{reinterpret_cast<const int64_t*>(device + places.first_chunk),
              reinterpret_cast<const TensorView*>(device + places.tensors), static_cast<int>(n)};
  auto* states = reinterpret_cast<Moments*>(device + places.states);
  auto* rows = reinterpret_cast<Moments*>(device);
  void* of_chunks[] = {&table, &states};
  void* of_tensors[] = {&table, &states, &rows};

  cudaError_t error =
      cudaMemcpyAsync(device + places.first_chunk, host + places.first_chunk,
                      places.states - places.first_chunk, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess && all_chunks > 0) {
    error = cudaLaunchKernel(paramstats_summarize_chunks, dim3(static_cast<unsigned>(all_chunks)),
                             dim3(kThreads), of_chunks, 0, stream);
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(paramstats_merge_chunks, dim3(static_cast<unsigned>(n)),
                             dim3(kMergeThreads), of_tensors, 0, stream);
  }
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(host, device, places.first_chunk, cudaMemcpyDeviceToHost, stream);
  }
  return text_of(error);
}

}  // namespace

const Api& api() {
  static const Api functions = {check, is_capturing, exchange_capture_mode, sizes, enqueue};
  return functions;
}

}  // namespace paramstats::cuda
