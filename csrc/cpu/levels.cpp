// Finds the SIMD levels that the CPU supports.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <vector>

#include "engine.h"

namespace paramstats::cpu {

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
