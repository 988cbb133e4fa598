// Splits tensors into chunks, summarizes the chunks on a thread pool, and merges their states in
// order of their index.
#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <utility>

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

int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Reads one chunk. `dims` is null if the tensor is dense.
Moments read_chunk(const TensorView& t, const std::vector<Dim>* dims, int64_t index,
                   const Kernels& kernels) {
  const ChunkKernel kernel = kernels.chunk[static_cast<int>(t.dtype)];
  const int size = element_size(t.dtype);
  const int64_t begin = index * kChunk;
  const int64_t end = t.numel - begin < kChunk ? t.numel : begin + kChunk;
  if (dims == nullptr) return kernel(static_cast<const char*>(t.data) + begin * size, end - begin);
  Moments state;
  for (int64_t i = begin; i < end; i += kGather) {
    const int64_t n = end - i < kGather ? end - i : kGather;
    gather(t.data, *dims, i, n, size, gather_buffer);
    state = merge(state, kernel(gather_buffer, n));
  }
  return state;
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
    const int64_t chunks = chunk_count(tensors[t].numel);
    const auto* dims = dims_with_gaps(tensors[t], storage);
    Moments state;
    if (chunks > 0) state = read_chunk(tensors[t], dims, 0, kernels);
    for (int64_t c = 1; c < chunks; ++c) {
      state = merge(state, read_chunk(tensors[t], dims, c, kernels));
    }
    *out[t] = state;
  }
}

// The fixed cost of a call of a kernel, as the number of elements that it reads in that time.
constexpr int64_t kCallCost = 1024;

// A chunk of all tensors.
struct Position {
  size_t tensor = 0;
  int64_t chunk = 0;
  size_t state = 0;  // of this chunk or, if its tensor has only one, of the next one with a state
  bool operator<(const Position& other) const {
    return tensor < other.tensor || (tensor == other.tensor && chunk < other.chunk);
  }
};

// The data that all threads share. A tensor with several chunks has an element of `states` for
// each.
struct Job {
  const std::vector<TensorView>& tensors;
  const std::vector<Moments*>& out;
  const Kernels& kernels;
  // Of each task: a run of chunks that takes about as long as one chunk of kChunk elements.
  std::vector<Position> begin;
  std::vector<Moments> states;
  std::vector<std::pair<size_t, std::vector<Dim>>> gaps;  // of tensors with gaps, in order

  const std::vector<Dim>* dims(size_t tensor) const {
    const auto found =
        std::lower_bound(gaps.begin(), gaps.end(), tensor,
                         [](const auto& entry, size_t t) { return entry.first < t; });
    return found != gaps.end() && found->first == tensor ? &found->second : nullptr;
  }
};

void run_task(int64_t i, void* context) {
  Job& job = *static_cast<Job*>(context);
  const WithDenormals with_denormals;
  for (Position at = job.begin[i]; at < job.begin[i + 1];) {
    const TensorView& t = job.tensors[at.tensor];
    const int64_t chunks = chunk_count(t.numel);
    if (chunks == 0) {
      *job.out[at.tensor] = Moments();
    } else {
      Moments& state = chunks == 1 ? *job.out[at.tensor] : job.states[at.state++];
      state = read_chunk(t, job.dims(at.tensor), at.chunk, job.kernels);
    }
    if (++at.chunk >= chunks) at = {at.tensor + 1, 0, at.state};
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
  Job job{tensors, out, kernels, {Position()}, {}, {}};
  int64_t in_task = 0;
  size_t states = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    std::vector<Dim> storage;
    if (dims_with_gaps(tensors[t], storage)) job.gaps.emplace_back(t, std::move(storage));
    const int64_t numel = tensors[t].numel, chunks = chunk_count(numel);
    for (int64_t c = 0; c < chunks; ++c) {
      if (chunks > 1) ++states;
      in_task += kCallCost + (numel - c * kChunk < kChunk ? numel - c * kChunk : kChunk);
      if (in_task < kChunk) continue;
      job.begin.push_back(c + 1 < chunks ? Position{t, c + 1, states} : Position{t + 1, 0, states});
      in_task = 0;
    }
  }
  const Position end{tensors.size(), 0, states};
  if (job.begin.back() < end) job.begin.push_back(end);
  job.states.resize(states);

  pool(static_cast<int64_t>(job.begin.size()) - 1, run_task, &job);

  auto state = job.states.begin();
  for (size_t t = 0; state != job.states.end(); ++t) {
    const int64_t chunks = chunk_count(tensors[t].numel);
    if (chunks < 2) continue;
    *out[t] = *state++;
    for (int64_t c = 1; c < chunks; ++c) *out[t] = merge(*out[t], *state++);
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
