// Splits tensors into chunks, summarizes the chunks on a thread pool, and merges their states in
// order of their index.
#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstring>

#include "denormals.h"
#include "strides.h"

namespace paramstats::cpu {
namespace {

// Elements of a tensor with gaps that are copied to contiguous memory at a time: 64 KiB of the
// widest dtype, which stay in L2.
constexpr int64_t kGather = 2 * kPart;

// Thread-local instead of on the stack, which is too small on some threads.
alignas(64) thread_local char gather_buffer[kGather * 8];
alignas(64) thread_local double part_buffer[kPart];

struct Chunk {
  const TensorView* tensor;
  const std::vector<Dim>* dims;  // null if the tensor is dense
  int64_t begin;
  int64_t n;
};

Moments read_chunk(const Chunk& c, const Kernels& kernels) {
  const ChunkKernel kernel = kernels.chunk[static_cast<int>(c.tensor->dtype)];
  const int size = element_size(c.tensor->dtype);
  if (c.dims == nullptr) {
    return kernel(static_cast<const char*>(c.tensor->data) + c.begin * size, c.n);
  }
  Moments state;
  for (int64_t i = 0; i < c.n; i += kGather) {
    const int64_t n = c.n - i < kGather ? c.n - i : kGather;
    gather(c.tensor->data, *c.dims, c.begin + i, n, size, gather_buffer);
    state = merge(state, kernel(gather_buffer, n));
  }
  return state;
}

int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

Chunk chunk_at(const TensorView& t, const std::vector<Dim>* dims, int64_t index) {
  const int64_t begin = index * kChunk;
  return {&t, dims, begin, t.numel - begin < kChunk ? t.numel - begin : kChunk};
}

// The dimensions of a tensor with gaps (stored in `storage`), or null for a dense tensor.
const std::vector<Dim>* dims_with_gaps(const TensorView& t, std::vector<Dim>& storage) {
  if (is_contiguous(t)) return nullptr;
  storage = memory_order(t);
  return is_dense(storage) ? nullptr : &storage;
}

void summarize_on_this_thread(const std::vector<TensorView>& tensors,
                              const std::vector<Moments*>& out, const Kernels& kernels) {
  std::vector<Dim> storage;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const auto* dims = dims_with_gaps(tensors[t], storage);
    Moments state;
    for (int64_t c = 0; c < chunk_count(tensors[t].numel); ++c) {
      state = merge(state, read_chunk(chunk_at(tensors[t], dims, c), kernels));
    }
    *out[t] = state;
  }
}

// The data that all threads share. Each chunk has its own element of `states`.
struct Job {
  std::vector<Chunk> chunks;
  std::vector<int64_t> task_begin;  // a task is a run of chunks, of about kChunk elements in total
  std::vector<Moments> states;
  const Kernels* kernels;
};

void run_task(int64_t i, void* context) {
  Job& job = *static_cast<Job*>(context);
  const WithDenormals with_denormals;
  for (int64_t c = job.task_begin[i]; c < job.task_begin[i + 1]; ++c) {
    job.states[c] = read_chunk(job.chunks[c], *job.kernels);
  }
}

}  // namespace

double* scratch() { return part_buffer; }

int64_t total_bytes(const std::vector<TensorView>& tensors) {
  int64_t bytes = 0;
  for (const TensorView& t : tensors) bytes += t.numel * element_size(t.dtype);
  return bytes;
}

void summarize(const std::vector<TensorView>& tensors, const std::vector<Moments*>& out,
               const Kernels& kernels, Pool pool) {
  const WithDenormals with_denormals;
  if (pool == nullptr || total_bytes(tensors) < kSerialBytes) {
    return summarize_on_this_thread(tensors, out, kernels);
  }
  Job job;
  job.kernels = &kernels;
  std::vector<std::vector<Dim>> storage(tensors.size());
  int64_t in_task = 0;
  job.task_begin.push_back(0);
  for (size_t t = 0; t < tensors.size(); ++t) {
    const auto* dims = dims_with_gaps(tensors[t], storage[t]);
    for (int64_t c = 0; c < chunk_count(tensors[t].numel); ++c) {
      job.chunks.push_back(chunk_at(tensors[t], dims, c));
      in_task += job.chunks.back().n;
      if (in_task >= kChunk) {
        job.task_begin.push_back(static_cast<int64_t>(job.chunks.size()));
        in_task = 0;
      }
    }
  }
  if (in_task > 0) job.task_begin.push_back(static_cast<int64_t>(job.chunks.size()));
  job.states.resize(job.chunks.size());

  pool(static_cast<int64_t>(job.task_begin.size()) - 1, run_task, &job);

  size_t c = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    Moments state;
    for (int64_t k = chunk_count(tensors[t].numel); k > 0; --k)
      state = merge(state, job.states[c++]);
    *out[t] = state;
  }
}

#if defined(__x86_64__)
namespace {

// The sets of instructions that the CPU and the operating system support and the kernels need.
// (__builtin_cpu_supports reports none if zig has compiled this.)
struct Features {
  bool avx2 = false, avx512 = false;
};

Features features_of_cpu() {
  Features features;
  unsigned a, b, c, d;
  constexpr unsigned kFma = 1 << 12, kSavesState = 1 << 27, kF16c = 1 << 29;
  constexpr unsigned kFirst = kFma | kSavesState | kF16c;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst) return features;
  unsigned saved, high;  // the registers that the operating system saves
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kSavesAvx = 0x06, kSavesAvx512 = 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  constexpr unsigned kAvx2 = 1 << 5;
  constexpr unsigned kAvx512 = 1 << 16 | 1 << 17 | 1 << 30 | 1u << 31;  // F, DQ, BW, VL
  features.avx2 = (b & kAvx2) != 0 && (saved & kSavesAvx) == kSavesAvx;
  features.avx512 =
      features.avx2 && (b & kAvx512) == kAvx512 && (saved & kSavesAvx512) == kSavesAvx512;
  return features;
}

}  // namespace
#endif

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> available = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const Features features = features_of_cpu();
    if (features.avx512) found.push_back(&avx512::kKernels);
    if (features.avx2) found.push_back(&avx2::kKernels);
#elif defined(__aarch64__)
    found.push_back(&neon::kKernels);
#endif
    found.push_back(&plain::kKernels);
    return found;
  }();
  return available;
}

}  // namespace paramstats::cpu
