// Runs tasks on torch's own threads through torch's stable C interface. That interface works with
// any compiler and OpenMP flags (at::parallel_for does not). It needs TORCH_TARGET_VERSION, so this
// code has its own file.
#define TORCH_TARGET_VERSION 0x020a000000000000  // 2.10.0, the oldest supported torch
#include "thread_pool.h"

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#if defined(PARAMSTATS_STD_THREADS)
#include <thread>
#include <vector>
#endif

namespace paramstats {
namespace {

// A child of fork() does not have its parent's threads. OpenMP would wait for them forever.
bool is_forked_child = false;
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

struct Shared {
  std::atomic<int64_t> next{0};
  int64_t n;
  cpu::Task task;
  void* context;
};

// Each thread takes the next task until there are none, so that a slow task does not delay others.
void take_tasks(int64_t, int64_t, void* context) {
  Shared& shared = *static_cast<Shared*>(context);
  for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.n;) {
    shared.task(i, shared.context);
  }
}

#if defined(PARAMSTATS_STD_THREADS)
// Replaces torch's function when built for the thread sanitizer (tools/sanitize.py), which does not
// understand OpenMP's barriers.
void torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*part)(int64_t, int64_t, void*),
                        void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(part, i, i + 1, context);
  for (auto& thread : threads) thread.join();
}
#endif

}  // namespace

int torch_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return static_cast<int>(threads);
}

void torch_pool(int64_t n, cpu::Task task, void* context) {
  Shared shared;
  shared.n = n;
  shared.task = task;
  shared.context = context;
  const int64_t threads = std::min<int64_t>(torch_threads(), n);
  if (threads > 1 && !is_forked_child) torch_parallel_for(0, threads, 1, take_tasks, &shared);
  take_tasks(0, 0, &shared);  // all tasks without a pool, or the remaining ones if the pool failed
}

}  // namespace paramstats
