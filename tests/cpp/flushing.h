// Sets the processor to take numbers below the normal range for zero, as torch.set_flush_denormal
// does.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flushing {

// The word that controls it; on other processors nothing does.
#if defined(__x86_64__)
using Word = uint32_t;
constexpr Word kFlush = 0x8040;  // FTZ and DAZ
inline Word get() { return _mm_getcsr(); }
inline void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
using Word = uint64_t;
constexpr Word kFlush = Word{1} << 24;  // FZ
inline Word get() {
  Word word;
  __asm__ volatile("mrs %0, fpcr" : "=r"(word));
  return word;
}
inline void set(Word word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#else
using Word = uint32_t;
constexpr Word kFlush = 0;
inline Word get() { return 0; }
inline void set(Word) {}
#endif

inline bool is_on() { return (get() & kFlush) == kFlush; }

// While it lives, for the calling thread and for those that it starts.
class FlushingToZero {
 public:
  FlushingToZero() : saved_(get()) { set(saved_ | kFlush); }
  ~FlushingToZero() { set(saved_); }
  FlushingToZero(const FlushingToZero&) = delete;
  FlushingToZero& operator=(const FlushingToZero&) = delete;

 private:
  Word saved_;
};

}  // namespace flushing
