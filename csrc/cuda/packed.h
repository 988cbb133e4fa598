// Arithmetic that C++ has no operators for: two float16 in a word, and roundings that no compiler
// may choose. A part of kernels.h. The CPU implementation of CUDA in tests/cpp/cuda_shim has its
// own versions of the instructions.
#pragma once

#include "../portable.h"

namespace paramstats::cuda {

// A compiler may replace a product and a sum by one instruction with one rounding, or not.
// Compilers choose differently, and so would the bits of a result. These functions state the
// roundings: `fused` has one, and `times` is never fused with what follows.
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
using paramstats::times;

#if defined(__CUDACC__)

// The compiler knows nothing about the variable from here on. Otherwise it would compute an address
// again for each of several conditional loads, and keep what it computed before a loop in registers
// that the loop needs.
template <class T>
__device__ inline void recompute(const T*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ inline void recompute(int& n) { asm volatile("" : "+r"(n)); }

// The value of the float16 in the low half of a word.
__device__ inline float half_value(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}

// The functions below need sm_89, or sm_80 those without a conversion. If one of two elements is
// NaN, the extremes are the other one.
__device__ inline uint32_t smaller_halves(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("min.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline uint32_t add_halves(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

// 1.0 for each element that is zero, 0.0 for the others.
__device__ inline uint32_t zero_halves(uint32_t a) {
  uint32_t out;
  asm("set.eq.f16x2.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(0u));
  return out;
}

// Converts the two 8-bit floats in the low half of a word. Every value of theirs is a float16.
__device__ inline uint32_t halves_of_e4m3(uint32_t bits) {
  uint32_t out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(static_cast<uint16_t>(bits)));
  return out;
}
__device__ inline uint32_t halves_of_e5m2(uint32_t bits) {
  uint32_t out;
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(out) : "h"(static_cast<uint16_t>(bits)));
  return out;
}

#else

template <class T>
void recompute(T&) {}
using cuda_shim::add_halves;
using cuda_shim::half_value;
using cuda_shim::halves_of_e4m3;
using cuda_shim::halves_of_e5m2;
using cuda_shim::larger_halves;
using cuda_shim::smaller_halves;
using cuda_shim::zero_halves;

#endif

}  // namespace paramstats::cuda
