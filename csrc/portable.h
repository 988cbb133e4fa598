// Types, macros and constants that differ between host compilers, nvcc and NVRTC.
// NVRTC has no standard headers.
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define PARAMSTATS_HD __host__ __device__
#define PARAMSTATS_INLINE __host__ __device__ __forceinline__
#else
#define PARAMSTATS_HD
// For templates that the CPU kernels use: no copy of them may be compiled for a SIMD level.
#define PARAMSTATS_INLINE inline __attribute__((always_inline))
#endif

// Infinity, NaN and the largest finite value of double. Device code cannot call the functions of
// std::numeric_limits.
#if defined(__CUDACC_RTC__)
#define kInfinity __longlong_as_double(0x7ff0000000000000)
#define kNaN __longlong_as_double(0x7ff8000000000000)
#endif

namespace paramstats {

#if !defined(__CUDACC_RTC__)
constexpr double kInfinity = __builtin_huge_val();
constexpr double kNaN = __builtin_nan("");
#endif
constexpr double kLargest = 1.7976931348623157e308;

// a * b, rounded. CUDA's compilers would fuse a product with a sum, and not all in the same places:
// the bits of a result would depend on the compiler.
PARAMSTATS_HD inline double times(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
PARAMSTATS_HD inline float times(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PARAMSTATS_HD inline uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
#endif
}
PARAMSTATS_HD inline uint64_t bits_of(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
#endif
}
PARAMSTATS_HD inline float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}
PARAMSTATS_HD inline double from_bits(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<int64_t>(bits));
#else
  double x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

}  // namespace paramstats
