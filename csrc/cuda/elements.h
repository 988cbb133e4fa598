// How each dtype is read: sixteen bytes at a time into float32 lanes, or into float64 lanes if
// float32 cannot represent it exactly. A part of kernels.h.
#pragma once

#include "../dtypes.h"

namespace paramstats::cuda {

// The four 32-bit words of a 16-byte load.
struct Words {
  uint32_t w[4];
};

// The arithmetic of the sums. A sum of squares below kMinSquares may have lost digits to underflow:
// above it, the roundings of a chunk (at most 2^17) at the smallest step of float32, 2^-149, are
// less than 1e-7 of the sum.
struct InFloat {
  static constexpr int kTile = 4;  // 16-byte loads in flight per thread
  using Lanes = InFloat;
  using Lane = float;
  using Count = float;  // exact for all counts in a chunk, and faster than an integer
  static constexpr double kMinSquares = 2e-33;
};
struct InDouble {
  static constexpr int kTile = 2;
  using Lanes = InDouble;
  using Lane = double;
  using Count = int;
  static constexpr double kMinSquares = 0;
};

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline double as_double(uint32_t low, uint32_t high) {
  return __longlong_as_double(static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low));
}

// The value of the float16 in the low half of a word.
__device__ inline float half_value(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
#else
  const float value = as_float((bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return as_float(__float_as_uint(value) | special | (bits & 0x8000u) << 16);
#endif
}

// Byte i of a word as a float32. Builds the float 2^23 + byte, which is cheaper than a conversion.
__device__ inline float byte_value(uint32_t word, int i) {
  return as_float(__byte_perm(word, 0x4b000000u, 0x7540u | i)) - 0x1p23f;
}

// ---- one struct per dtype ----------------------------------------------------------------------
// unpack(words, x) converts all elements of sixteen bytes, in memory order.

struct Float64 : InDouble {
  using Storage = unsigned long long;
  __device__ static void unpack(const Words& v, double (&x)[2]) {
    for (int i = 0; i < 2; ++i) x[i] = as_double(v.w[2 * i], v.w[2 * i + 1]);
  }
};

struct Float32 : InFloat {
  using Storage = uint32_t;
  __device__ static void unpack(const Words& v, float (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = as_float(v.w[i]);
  }
};

struct BFloat16 : InFloat {
  using Storage = uint16_t;
  __device__ static void unpack(const Words& v, float (&x)[8]) {
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = as_float(v.w[i] << 16);
      x[2 * i + 1] = as_float(v.w[i] & 0xffff0000u);
    }
  }
};

struct Float16 : InFloat {
  using Storage = uint16_t;
  __device__ static void unpack(const Words& v, float (&x)[8]) {
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = half_value(v.w[i] & 0xffffu);
      x[2 * i + 1] = half_value(v.w[i] >> 16);
    }
  }
};

// The bits of an 8-bit float, as the upper bits of a float16, are a float16. Four bytes become two
// words of two float16 each: the even bytes and the odd bytes.
struct Float8E5M2 : InFloat {
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = v.w[i] << 8 & 0xff00ff00u, odd = v.w[i] & 0xff00ff00u;
      x[4 * i] = half_value(even & 0xffffu);
      x[4 * i + 1] = half_value(odd & 0xffffu);
      x[4 * i + 2] = half_value(even >> 16);
      x[4 * i + 3] = half_value(odd >> 16);
    }
  }
};

struct Float8E4M3FN : InFloat {  // has no infinity; NaN is all ones
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 4; ++i) {  // its exponent has one bit less than that of float16
      const uint32_t even = v.w[i] << 8, odd = v.w[i];
      const uint32_t e = (even & 0x80008000u) | (even >> 1 & 0x3f803f80u);
      const uint32_t o = (odd & 0x80008000u) | (odd >> 1 & 0x3f803f80u);
      x[4 * i] = half_value(e & 0xffffu) * 256.0f;
      x[4 * i + 1] = half_value(o & 0xffffu) * 256.0f;
      x[4 * i + 2] = half_value(e >> 16) * 256.0f;
      x[4 * i + 3] = half_value(o >> 16) * 256.0f;
      // Sums only need to know whether any element is NaN, so a NaN among four sets the first.
      if (((v.w[i] & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) x[4 * i] = as_float(0x7fc00000u);
    }
  }
};

struct UInt8 : InFloat {
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 16; ++i) x[i] = byte_value(v.w[i / 4], i % 4);
  }
};

struct Int8 : InFloat {  // converted as the unsigned x + 128
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 16; ++i) x[i] = byte_value(v.w[i / 4] ^ 0x80808080u, i % 4) - 128.0f;
  }
};

struct Bool : InFloat {  // bytes that are not 0 become 1
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t w = v.w[i / 4];
      const uint32_t ones = (((w & 0x7f7f7f7fu) + 0x7f7f7f7fu) | w) >> 7 & 0x01010101u;
      x[i] = byte_value(ones, i % 4);
    }
  }
};

struct Int16 : InFloat {
  using Storage = uint16_t;
  __device__ static void unpack(const Words& v, float (&x)[8]) {
    for (int i = 0; i < 8; ++i) {
      x[i] = static_cast<float>(static_cast<int16_t>(v.w[i / 2] >> (i % 2 * 16)));
    }
  }
};

struct UInt16 : InFloat {
  using Storage = uint16_t;
  __device__ static void unpack(const Words& v, float (&x)[8]) {
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(v.w[i / 2] >> (i % 2 * 16) & 0xffffu);
  }
};

struct Int32 : InDouble {
  using Storage = uint32_t;
  __device__ static void unpack(const Words& v, double (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = static_cast<int32_t>(v.w[i]);
  }
};

struct UInt32 : InDouble {
  using Storage = uint32_t;
  __device__ static void unpack(const Words& v, double (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = v.w[i];
  }
};

struct Int64 : InDouble {
  using Storage = unsigned long long;
  __device__ static void unpack(const Words& v, double (&x)[2]) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = static_cast<uint64_t>(v.w[2 * i + 1]) << 32 | v.w[2 * i];
      x[i] = static_cast<double>(static_cast<int64_t>(bits));
    }
  }
};

struct UInt64 : InDouble {
  using Storage = unsigned long long;
  __device__ static void unpack(const Words& v, double (&x)[2]) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = static_cast<uint64_t>(v.w[2 * i + 1]) << 32 | v.w[2 * i];
      x[i] = static_cast<double>(bits);
    }
  }
};

template <class E>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(typename E::Storage));

// Reads one element, with `unpack`.
template <class E>
__device__ inline typename E::Lane element(const typename E::Storage* x, int64_t i) {
  Words v = {};
  const typename E::Storage bits = __ldg(x + i);
  v.w[0] = static_cast<uint32_t>(bits);
  if (sizeof(bits) == 8) v.w[1] = static_cast<uint32_t>(static_cast<uint64_t>(bits) >> 32);
  typename E::Lane all[kPerVector<E>];
  E::unpack(v, all);
  return all[0];
}

}  // namespace paramstats::cuda
