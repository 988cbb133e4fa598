// Turns off flush-to-zero in a scope, so that subnormal numbers keep their values.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paramstats::cpu {

// In its scope, subnormal numbers are neither read nor written as zero. Otherwise the statistics
// would depend on whether torch.set_flush_denormal had an effect on the thread that read the chunk.
class WithDenormals {
 public:
#if defined(__x86_64__)
  WithDenormals() : saved_(_mm_getcsr()) {
    constexpr uint32_t kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    if (saved_ & (kFlushToZero | kDenormalsAreZero)) {
      _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero));
    }
  }
  ~WithDenormals() { _mm_setcsr(saved_); }
  uint32_t saved_;
#elif defined(__aarch64__)
  WithDenormals() {
    constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ & ~kFlushToZero));
  }
  ~WithDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
  uint64_t saved_;
#else
  WithDenormals() {}
#endif
  WithDenormals(const WithDenormals&) = delete;
  WithDenormals& operator=(const WithDenormals&) = delete;
};

}  // namespace paramstats::cpu
