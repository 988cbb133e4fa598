// Runs tasks on torch's own threads.
#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "torch_abi.h"
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

void run_in_threads(int64_t threads, void (*part)(int64_t, int64_t, void*), void* context) {
#if defined(PARAMSTATS_STD_THREADS)
  // For the thread sanitizer (tools/sanitize.py), which does not understand OpenMP's barriers.
  std::vector<std::thread> started;
  for (int64_t i = 0; i < threads; ++i) started.emplace_back(part, i, i + 1, context);
  for (auto& thread : started) thread.join();
#else
  torch_abi::api.torch_parallel_for(0, threads, 1, part, context);
#endif
}

}  // namespace

int torch_threads() {
  uint32_t threads = 1;
  torch_abi::api.torch_get_num_threads(&threads);
  return static_cast<int>(threads);
}

void torch_pool(int64_t n, cpu::Task task, void* context) {
  Shared shared;
  shared.n = n;
  shared.task = task;
  shared.context = context;
  const int64_t threads = std::min<int64_t>(torch_threads(), n);
  if (threads > 1 && !is_forked_child) run_in_threads(threads, take_tasks, &shared);
  take_tasks(0, 0, &shared);  // all tasks without a pool, or the remaining ones if the pool failed
}

}  // namespace paramstats
