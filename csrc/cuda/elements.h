// How each dtype is read: sixteen bytes at a time into float32 lanes, into float64 lanes if float32
// cannot represent it exactly, or as packed elements where the GPU can compute with them. A part of
// kernels.h.
#pragma once

#include "../dtypes.h"
#include "packed.h"

namespace paramstats::cuda {

// The four 32-bit words of a 16-byte load.
struct Words {
  uint32_t w[4];
};

// ---- kinds of arithmetic -----------------------------------------------------------------------
// sums.h defines the states. kTile loads are added up before a sum is widened to float64; kLoads of
// 16 bytes are in flight per thread. A sum of squares below kMinSquares may have lost digits to
// underflow: above it, the roundings of a chunk (at most kMostElements) at the smallest step of
// float32, 2^-149, are less than 1e-7 of the sum.

constexpr int kMostElements = 1 << 17;  // of a chunk

template <class E>
struct LaneState;
template <class E>
struct HalfState;
template <class E>
struct ByteState;
template <class E>
struct BoolState;

struct InFloat {
  template <class E>
  using State = LaneState<E>;
  static constexpr int kTile = 4, kLoads = 8;
  using Lanes = InFloat;
  using Lane = float;
  using Count = float;  // exact for all counts in a chunk, and faster than an integer
  static constexpr bool kPairs = false, kExact = false;
  static constexpr double kMinSquares = 2e-33;
};
struct InDouble {
  template <class E>
  using State = LaneState<E>;
  static constexpr int kTile = 2, kLoads = 8;
  using Lanes = InDouble;
  using Lane = double;
  using Count = int;
  static constexpr bool kPairs = false, kExact = false;
  static constexpr double kMinSquares = 0;
};
struct InHalves : InFloat {  // pairs of float16: extremes and zeros of two elements at a time
  template <class E>
  using State = HalfState<E>;
  static constexpr bool kPairs = true;
};
struct InBytes : InFloat {  // sums of integers
  template <class E>
  using State = ByteState<E>;
  static constexpr bool kExact = true;
};

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline double as_double(uint32_t low, uint32_t high) {
  return __longlong_as_double(static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low));
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

// sm_75 to sm_88 have no instruction for 8-bit floats, and sm_75 none for the extremes of pairs.
struct Float16FromBits : InFloat {
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
struct Float8E5M2FromBits : InFloat {
  static constexpr int kLoads = 4;  // more need more registers than there are
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

struct Float8E4M3FNFromBits : InFloat {  // has no infinity; NaN is all ones
  static constexpr int kLoads = 4;
  using Storage = uint8_t;
  __device__ static void unpack(const Words& v, float (&x)[16]) {
    for (int i = 0; i < 4; ++i) {  // its exponent has one bit less than that of float16
      const uint32_t even = v.w[i] << 8, odd = v.w[i];
      const uint32_t e = (even & 0x80008000u) | (even >> 1 & 0x3f803f80u);
      const uint32_t o = (odd & 0x80008000u) | (odd >> 1 & 0x3f803f80u);
      x[4 * i] = times(half_value(e & 0xffffu), 256.0f);
      x[4 * i + 1] = times(half_value(o & 0xffffu), 256.0f);
      x[4 * i + 2] = times(half_value(e >> 16), 256.0f);
      x[4 * i + 3] = times(half_value(o >> 16), 256.0f);
      // Sums only need to know whether any element is NaN, so a NaN among four sets the first.
      if (((v.w[i] & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u) x[4 * i] = as_float(0x7fc00000u);
    }
  }
};

// halves(words, h) converts sixteen bytes to pairs of float16, in memory order.
struct Float16Pairs : InHalves {
  using Storage = uint16_t;
  __device__ static void halves(const Words& v, uint32_t (&h)[4]) {
    for (int i = 0; i < 4; ++i) h[i] = v.w[i];
  }
};

struct Float8E5M2Pairs : InHalves {
  using Storage = uint8_t;
  __device__ static void halves(const Words& v, uint32_t (&h)[8]) {
    for (int i = 0; i < 8; ++i) h[i] = halves_of_e5m2(v.w[i / 2] >> (i % 2 * 16));
  }
};

struct Float8E4M3FNPairs : InHalves {
  using Storage = uint8_t;
  __device__ static void halves(const Words& v, uint32_t (&h)[8]) {
    for (int i = 0; i < 8; ++i) h[i] = halves_of_e4m3(v.w[i / 2] >> (i % 2 * 16));
  }
};

// Code for the CPU uses the newer path of each choice; tests use the other one by its name.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
using Float16 = Float16FromBits;
using Float8E5M2 = Float8E5M2FromBits;
using Float8E4M3FN = Float8E4M3FNFromBits;
#else
using Float16 = Float16Pairs;
using Float8E5M2 = Float8E5M2Pairs;
using Float8E4M3FN = Float8E4M3FNPairs;
#endif

// Integers of one byte, signed (int) or not. kCompared bytes of a word are compared at once: two
// where that is one instruction.
template <class I, int kBytes>
struct Bytes : InBytes {
  using Storage = uint8_t;
  using Int = I;
  static constexpr int kCompared = kBytes;
  __device__ static float value(uint32_t byte) {
    return static_cast<float>(static_cast<Int>(byte << 24) >> 24);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBytesCompared = 1;
#else
constexpr int kBytesCompared = 2;
#endif
using Int8 = Bytes<int32_t, kBytesCompared>;
using UInt8 = Bytes<uint32_t, kBytesCompared>;

struct Bool : InBytes {  // bytes that are not 0 are true
  template <class E>
  using State = BoolState<E>;
  using Storage = uint8_t;
  __device__ static float value(uint32_t byte) { return byte != 0 ? 1.0f : 0.0f; }
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

// Loads one element into the low bits of the first word, or of two.
template <class E>
__device__ inline Words load_one(const typename E::Storage* x, int64_t i) {
  const uint64_t bits = __ldg(x + i);
  return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), 0, 0}};
}

// The value of an element in the low bits.
template <class E>
__device__ inline typename E::Lane value_of(const Words& v) {
  if constexpr (E::kExact) {
    return E::value(v.w[0]);
  } else if constexpr (E::kPairs) {
    uint32_t h[kPerVector<E> / 2];
    E::halves(v, h);
    return half_value(h[0] & 0xffffu);
  } else {
    typename E::Lane x[kPerVector<E>];
    E::unpack(v, x);
    return x[0];
  }
}

template <class E>
__device__ inline typename E::Lane element(const typename E::Storage* x, int64_t i) {
  return value_of<E>(load_one<E>(x, i));
}

}  // namespace paramstats::cuda
