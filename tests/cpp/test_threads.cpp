// The CPU engine on threads that stay, as torch's do, for several callers at once: made for the
// thread sanitizer, which sees every access that no lock and no atomic has put in order.
//
//     g++ -std=c++17 -O1 -g -fsanitize=thread -pthread tests/cpp/test_threads.cpp csrc/cpu/*.cpp
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/engine.h"
#include "check.h"
#include "oracle.h"
#include "tensor.h"

namespace paramstats::cpu::test {
namespace {

constexpr int kWorkers = 3, kCallers = 3, kRepetitions = 4;

// Threads that wait for work. A call is in the line once for every worker, and its caller works
// too.
class Workers {
 public:
  Workers() {
    for (int i = 0; i < kWorkers; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Workers() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    something_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(int64_t n, Task task, void* context) {
    Call call{n, task, context};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int i = 0; i < kWorkers; ++i) line_.push_back(&call);
    }
    something_.notify_all();
    call.take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [&] { return call.left == 0; });
  }

 private:
  struct Call {
    int64_t n;
    Task task;
    void* context;
    int left = kWorkers;  // workers that have not finished with it
    std::atomic<int64_t> next{0};

    void take_tasks() {
      // Relaxed, as in thread_pool.cpp: what the tasks wrote is seen because of the lock.
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(i, context);
    }
  };

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      something_.wait(lock, [this] { return ended_ || !line_.empty(); });
      if (line_.empty()) return;
      Call* call = line_.front();
      line_.pop_front();
      lock.unlock();
      call->take_tasks();
      lock.lock();
      if (--call->left == 0) finished_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable something_, finished_;
  std::deque<Call*> line_;
  std::vector<std::thread> threads_;
  bool ended_ = false;
};

void shared_pool(int64_t n, Task task, void* context) {
  static Workers workers;
  workers.run(n, task, context);
}

// Runs `caller(i)` on threads of its own that start together.
void at_once(const std::function<void(int)>& caller) {
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

// Runs first: the levels are looked up by whoever comes first.
void the_first_calls_come_at_once() {
  std::vector<const Kernels*> found(kCallers);
  at_once([&](int i) { found[i] = available_kernels().front(); });
  for (const Kernels* kernels : found) CHECK(kernels, available_kernels().front());
}

void callers_share_tensors_and_threads() {
  const Tensor large(DType::kFloat32, 5 * kChunk + 77), exact(DType::kBFloat16, 2 * kChunk);
  const Tensor gaps(DType::kFloat16, {300, 1000}, {1, 304}), bytes(DType::kUInt8, 3 * kChunk - 1);
  const Tensor small(DType::kFloat32, 1000), none(DType::kFloat32, 0);
  const std::vector<const Tensor*> company = {&none, &large, &exact, &gaps, &small, &bytes};
  for (const Kernels* kernels : available_kernels()) {
    const std::vector<Moments> want = summaries_of(company, *kernels);
    std::vector<std::vector<Moments>> got(kCallers);
    for (int repetition = 0; repetition < kRepetitions; ++repetition) {
      at_once([&](int i) { got[i] = summaries_of(company, *kernels, shared_pool); });
      for (int i = 0; i < kCallers; ++i) {
        for (size_t t = 0; t < company.size(); ++t) {
          check::at(std::string(kernels->name) + " caller " + std::to_string(i));
          CHECK(oracle::same_bits(got[i][t], want[t]), true);
        }
      }
    }
  }
}

// Elements of one memory: one thread reads the middle while another writes to both sides of it, so
// that a kernel which reads too much is a race. An address sanitizer sees nothing wrong there.
void neighbours_may_be_written_to() {
  constexpr int64_t kSide = 64;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kFloat8E4M3FN, DType::kInt64}) {
    const int size = element_size(dtype);
    for (int64_t n : {1, 63, 1000, 300'000}) {
      Tensor whole(dtype, n + 2 * kSide);
      const int64_t stride = 1;
      const TensorView middle = {whole.memory.data() + kSide * size, dtype, n, 1, &n, &stride};
      for (const Kernels* kernels : available_kernels()) {
        check::at(std::string(kernels->name) + " " + name_of(dtype) + " " + std::to_string(n));
        Moments state;
        std::thread writer([&] {
          for (int64_t i = 0; i < kSide * size; ++i) whole.memory[i] ^= 1;
          for (int64_t i = (kSide + n) * size; i < (2 * kSide + n) * size; ++i)
            whole.memory[i] ^= 1;
        });
        summarize({middle}, {&state}, *kernels, shared_pool);
        writer.join();
        CHECK(state.count, n);
      }
    }
  }
}

int run_all() {
  RUN(the_first_calls_come_at_once);
  RUN(callers_share_tensors_and_threads);
  RUN(neighbours_may_be_written_to);
  return check::report("cpp threads");
}

}  // namespace
}  // namespace paramstats::cpu::test

int main() { return paramstats::cpu::test::run_all(); }
