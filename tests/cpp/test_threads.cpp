// Tests of the CPU backend on persistent threads, like torch's, with several concurrent callers.
// Made for the thread sanitizer, which detects every access that is not ordered by a lock or an
// atomic.
//
//     g++ -std=c++17 -O1 -g -fsanitize=thread -pthread tests/cpp/test_threads.cpp csrc/cpu/*.cpp
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"

namespace paramstats::test {
namespace {

using cpu::available_kernels;
using cpu::kChunk;
using cpu::Kernels;

constexpr int kWorkers = 3, kCallers = 3, kRepetitions = 4;

// Persistent threads that run queued jobs.
class Workers {
 public:
  Workers() {
    for (int i = 0; i < kWorkers; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Workers() {
    for (int i = 0; i < kWorkers; ++i) enqueue({});  // an invalid job ends a thread
    for (auto& thread : threads_) thread.join();
  }

  using Job = std::packaged_task<void()>;
  void enqueue(Job job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(job));
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return !queue_.empty(); });
      Job job = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (!job.valid()) return;
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> queue_;
  std::vector<std::thread> threads_;
};

// Each worker and the caller take tasks until there are none.
void shared_pool(int64_t n, cpu::Task task, void* context) {
  static Workers workers;
  std::atomic<int64_t> next{0};
  const auto take_tasks = [&] {
    // Relaxed, as in thread_pool.cpp: the futures make the results of the tasks visible.
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(i, context);
  };
  std::vector<std::future<void>> done;
  for (int i = 0; i < kWorkers; ++i) {
    Workers::Job job(take_tasks);
    done.push_back(job.get_future());
    workers.enqueue(std::move(job));
  }
  take_tasks();
  for (auto& future : done) future.wait();
}

// Runs `caller(i)` on new threads that start together.
void run_together(const std::function<void(int)>& caller) {
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < kCallers; ++i) {
    threads.emplace_back([&, i] {
      while (!go) std::this_thread::yield();
      caller(i);
    });
  }
  go = true;
  for (auto& thread : threads) thread.join();
}

// Must run first: the first caller detects the SIMD levels.
void first_calls_are_concurrent() {
  std::vector<const Kernels*> found(kCallers);
  run_together([&](int i) { found[i] = available_kernels().front(); });
  for (const Kernels* kernels : found) CHECK(kernels, available_kernels().front());
}

void callers_share_tensors_and_threads() {
  const Tensors tensors = {
      Tensor(DType::kFloat32, 0),           Tensor(DType::kFloat32, 5 * kChunk + 77),
      Tensor(DType::kBFloat16, 2 * kChunk), Tensor(DType::kFloat16, {300, 1000}, {1, 304}),
      Tensor(DType::kFloat32, 1000),        Tensor(DType::kUInt8, 3 * kChunk - 1)};
  for (const Kernels* kernels : available_kernels()) {
    const std::vector<Moments> want = cpu_states(tensors, *kernels);
    std::vector<std::vector<Moments>> got(kCallers);
    for (int repetition = 0; repetition < kRepetitions; ++repetition) {
      run_together([&](int i) { got[i] = cpu_states(tensors, *kernels, shared_pool); });
      for (int i = 0; i < kCallers; ++i) {
        for (size_t t = 0; t < tensors.size(); ++t) {
          check::at(std::string(kernels->name) + " caller " + std::to_string(i));
          CHECK(oracle::same_bits(got[i][t], want[t]), true);
        }
      }
    }
  }
}

// One thread reads the middle of a buffer while another writes on both sides of it. A kernel that
// reads too much is then a race; the address sanitizer would not detect it.
void memory_next_to_a_tensor_may_be_written() {
  constexpr int64_t kSide = 64;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kFloat8E4M3FN, DType::kInt64}) {
    const int size = element_size(dtype);
    for (int64_t n : {1, 63, 1000, 300'000}) {
      Tensor whole(dtype, n + 2 * kSide);
      const int64_t stride = 1;
      const cpu::TensorView middle = {whole.memory.data() + kSide * size, dtype, n, 1, &n, &stride};
      for (const Kernels* kernels : available_kernels()) {
        check::at(std::string(kernels->name) + " " + name_of(dtype) + " " + std::to_string(n));
        Moments state;
        std::thread writer([&] {
          for (int64_t i = 0; i < kSide * size; ++i) {
            whole.memory[i] ^= 1;
            whole.memory[(kSide + n) * size + i] ^= 1;
          }
        });
        cpu::summarize({middle}, {&state}, *kernels, shared_pool);
        writer.join();
        CHECK(state.count, n);
      }
    }
  }
}

}  // namespace
}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  RUN(first_calls_are_concurrent);
  RUN(callers_share_tensors_and_threads);
  RUN(memory_next_to_a_tensor_may_be_written);
  return check::report("cpp threads");
}
