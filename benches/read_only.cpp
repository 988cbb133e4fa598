// The memory limit: a loop that reads memory and does almost nothing else.
//
// It adds up all bytes as 64-bit words, with one SIMD addition per vector. The sum proves that
// every byte was read. read_only.py compiles this file and selects the fastest prefetch distance:
//
// c++ -std=c++20 -O3 -march=native -shared -fPIC -pthread read_only.cpp
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>

namespace {

// ---- one thread ----------------------------------------------------------------------------

// The size of a SIMD register. GCC splits a larger vector into parts and copies each through the
// stack, which is three times as slow in the cache.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kUnroll = 8;  // independent sums, so that no addition waits for another
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

// kAhead: the prefetch distance in bytes; 0 leaves prefetching to the processor.
template <int kAhead>
uint64_t sum_words(const char* p, int64_t size) {
  constexpr int kStep = kUnroll * kVectorBytes;
  Words sums[kUnroll] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) {
      const char* from = p + i + u * kVectorBytes;
      if (kAhead > 0) __builtin_prefetch(from + kAhead);
      Words words;
      std::memcpy(&words, from, sizeof(words));
      sums[u] += words;
    }
  }
  uint64_t sum = 0;
  for (const Words& s : sums) {
    for (int l = 0; l < kVectorBytes / 8; ++l) sum += s[l];
  }
  for (; i < size; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, size - i < 8 ? size - i : 8);
    sum += word;
  }
  return sum;
}

// ---- several threads -----------------------------------------------------------------------

// The pieces of one thread: the same in every call, because its core may have them in its cache.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Job {
  const char* const* starts;
  const int64_t* sizes;
  uint64_t (*reader)(const char*, int64_t);
  std::deque<Share> shares;
  int threads;
  std::atomic<uint64_t> sum;
  std::atomic<int> working;
};
Job& job = *new Job;  // never destroyed, because the helper threads never end

// Reads the thread's own pieces, then the remaining pieces of slower threads.
void read_pieces(int thread) {
  uint64_t sum = 0;
  for (int k = 0; k < job.threads; ++k) {
    Share& share = job.shares[(thread + k) % job.threads];
    for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      sum += job.reader(job.starts[i], job.sizes[i]);
    }
  }
  job.sum.fetch_add(sum, std::memory_order_relaxed);
}

// Helper threads spin for about a millisecond after a call, as OpenMP's threads do, which torch and
// paramstats use. Waking a sleeping thread takes tens of microseconds.
constexpr int kYields = 2000;

struct alignas(64) Helper {
  std::atomic<int> calls{0};

  void serve(int thread) {
    for (int served = 0;; ++served) {
      for (int i = 0; i < kYields && calls.load() == served; ++i) std::this_thread::yield();
      calls.wait(served);
      read_pieces(thread);
      job.working.fetch_sub(1, std::memory_order_release);
    }
  }
};

}  // namespace

// Reads `pieces` pieces of memory with up to `threads` threads and returns the sum of their 64-bit
// words modulo 2^64. The last word of a piece is padded with zeros. Not thread-safe.
extern "C" uint64_t read_only(const char* const* starts, const int64_t* sizes, int64_t pieces,
                              int threads, int ahead) {
  static auto& helpers = *new std::deque<Helper>;
  while (static_cast<int>(helpers.size()) < threads - 1) {
    Helper& helper = helpers.emplace_back();
    std::thread(&Helper::serve, &helper, static_cast<int>(helpers.size())).detach();
  }
  while (static_cast<int>(job.shares.size()) < threads) job.shares.emplace_back();
  for (int k = 0; k < threads; ++k) {
    job.shares[k].next = pieces * k / threads;
    job.shares[k].end = pieces * (k + 1) / threads;
  }
  job.starts = starts;
  job.sizes = sizes;
  job.reader = ahead == 0 ? sum_words<0> : ahead <= 4096 ? sum_words<4096> : sum_words<16384>;
  job.threads = threads;
  job.sum = 0;
  job.working = threads - 1;
  for (int k = 0; k < threads - 1; ++k) {
    helpers[k].calls.fetch_add(1);
    helpers[k].calls.notify_one();
  }
  read_pieces(0);
  while (job.working.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  return job.sum;
}
