// How each element type is read: sixteen bytes at a time into lanes of float32, or of float64 for
// what float32 does not hold exactly. First part of kernels.h.
#pragma once

#include "../dtypes.h"

namespace paramstats::cuda {

// The four 32-bit words of a 16-byte load.
struct Words {
  uint32_t w[4];
};

// The arithmetic of the sums. A sum of squares below kLeastSquares may have lost digits: it makes
// the roundings of a chunk (at most 2^17) at float32's smallest step, 2^-149, less than 1e-7 of it.
struct InFloat {
  static constexpr int kTile = 4;  // loads of 16 bytes that a thread has under way
  using Lanes = InFloat;
  using Lane = float;
  using Count = float;  // of elements in a chunk, which it holds exactly and adds at less cost
  static constexpr double kLeastSquares = 2e-33;
};
struct InDouble {
  static constexpr int kTile = 2;
  using Lanes = InDouble;
  using Lane = double;
  using Count = int;
  static constexpr double kLeastSquares = 0;
};

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline double as_double(uint32_t low, uint32_t high) {
  return __longlong_as_double(static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low));
}

// A float16 from the low half of a word.
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

// Byte i of a word as a float32, by way of the float 2^23 + byte: cheaper than a conversion.
__device__ inline float byte_value(uint32_t word, int i) {
  return as_float(__byte_perm(word, 0x4b000000u, 0x7540u | i)) - 0x1p23f;
}

// ---- one struct per element type ---------------------------------------------------------------
// unpack(words, x) gives all elements of sixteen bytes, in the order that they lie in.

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

// A narrower float, put at the upper end of a half, reads as a float16 of the same or a wider
// exponent. Four bytes make two words of two halves: the even ones and the odd ones.
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

struct Float8E4M3FN : InFloat {  // no infinity; NaN is the one pattern of all ones
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 4; ++i) {  // its exponent has one bit less than float16's
      const uint32_t even = v.w[i] << 8, odd = v.w[i];
      const uint32_t e = (even & 0x80008000u) | (even >> 1 & 0x3f803f80u);
      const uint32_t o = (odd & 0x80008000u) | (odd >> 1 & 0x3f803f80u);
      x[4 * i] = half_value(e & 0xffffu) * 256.0f;
      x[4 * i + 1] = half_value(o & 0xffffu) * 256.0f;
      x[4 * i + 2] = half_value(e >> 16) * 256.0f;
      x[4 * i + 3] = half_value(o >> 16) * 256.0f;
      // Which of four is NaN does not matter to sums: if any is, the first is made one.
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

struct Int8 : InFloat {  // as x + 128, unsigned
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 16; ++i) x[i] = byte_value(v.w[i / 4] ^ 0x80808080u, i % 4) - 128.0f;
  }
};

struct Bool : InFloat {  // each byte that is not 0 becomes 1
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

// One element on its own, by the same road.
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
