// The sums of one thread: how each kind of arithmetic adds up the elements of its loads. A part of
// kernels.h.
//
// All states have the same interface. They start with an element of the chunk as extremes, `take`
// adds the elements of some loads, `take_one` the element in the low bits of the words, and `sums`
// returns what the threads of a block exchange.
#pragma once

#include "block.h"
#include "elements.h"

namespace paramstats::cuda {

// The sums of d = x - pivot and d^2 of a tile in independent lanes.
template <class Lane, int kLanes>
struct Deviations {
  Lane sum[kLanes], sum_sq[kLanes];

  // Adds element i of the tile. The first ones of the lanes save an addition to 0.
  __device__ void add(int i, Lane x, Lane pivot) {
    const int lane = i % kLanes;
    const Lane d = x - pivot;
    sum[lane] = i < kLanes ? d : sum[lane] + d;
    sum_sq[lane] = i < kLanes ? times(d, d) : fused(d, d, sum_sq[lane]);
  }

  // Adds the lanes to sums in float64.
  template <class S>
  __device__ void widen(S& s) {
#pragma unroll
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma unroll
      for (int l = 0; l < half; ++l) {
        sum[l] += sum[l + half];
        sum_sq[l] += sum_sq[l + half];
      }
    }
    s.sum += sum[0];
    s.sum_sq += sum_sq[0];
  }
};

template <class E>
constexpr int kLanes = kPerVector<E> == 16  ? 8
                       : kPerVector<E> == 2 ? 2
                                            : 4;

// Elements in lanes of float32 or float64.
template <class E>
struct LaneState {
  using Lane = typename E::Lane;
  using Count = typename E::Count;
  Sums<typename E::Lanes> s;

  __device__ explicit LaneState(const Words& first) { s.min = s.max = value_of<E>(first); }

  __device__ void compare(Lane x) {
    s.min = smaller(s.min, x);
    s.max = larger(s.max, x);
    s.zeros += x == 0 ? Count{1} : Count{0};
  }

  template <int kVectors>
  __device__ void take(const Words (&v)[kVectors], Lane pivot) {
    Deviations<Lane, kLanes<E>> tile;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      Lane x[kPerVector<E>];
      E::unpack(v[k], x);
#pragma unroll
      for (int i = 0; i < kPerVector<E>; ++i) {
        tile.add(k * kPerVector<E> + i, x[i], pivot);
        compare(x[i]);
      }
    }
    tile.widen(s);
  }

  __device__ void take_one(const Words& v, Lane pivot) {
    Deviations<Lane, 1> one;
    one.add(0, value_of<E>(v), pivot);
    compare(value_of<E>(v));
    one.widen(s);
  }

  __device__ Sums<typename E::Lanes> sums() const { return s; }
};

// Pairs of float16: the sums in float32 lanes, extremes and zeros of both elements at a time. The
// extremes ignore NaN, but the sums do not, so that the chunk is not accepted. Zeros are counted in
// float16, which is exact up to 2^11.
template <class E>
struct HalfState {
  double sum = 0, sum_sq = 0;
  uint32_t min, max, zeros = 0;

  __device__ explicit HalfState(const Words& first) { min = max = low_half(first) * 0x10001u; }

  __device__ static uint32_t low_half(const Words& v) {
    uint32_t h[kPerVector<E> / 2];
    E::halves(v, h);
    return h[0] & 0xffffu;
  }

  __device__ void compare(uint32_t h) {
    min = smaller_halves(min, h);
    max = larger_halves(max, h);
  }

  template <int kVectors>
  __device__ void take(const Words (&v)[kVectors], float pivot) {
    Deviations<float, kLanes<E>> tile;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      uint32_t h[kPerVector<E> / 2];
      E::halves(v[k], h);
#pragma unroll
      for (int i = 0; i < kPerVector<E> / 2; ++i) {
        const int first = k * kPerVector<E> + 2 * i;
        tile.add(first, half_value(h[i] & 0xffffu), pivot);
        tile.add(first + 1, half_value(h[i] >> 16), pivot);
        compare(h[i]);
        zeros = add_halves(zeros, zero_halves(h[i]));
      }
    }
    tile.widen(*this);
  }

  __device__ void take_one(const Words& v, float pivot) {
    const uint32_t h = low_half(v);
    Deviations<float, 1> one;
    one.add(0, half_value(h), pivot);
    one.widen(*this);
    compare(h * 0x10001u);
    zeros = add_halves(zeros, zero_halves(h) & 0xffffu);
  }

  __device__ Sums<InFloat> sums() const {
    Sums<InFloat> s;
    s.sum = sum;
    s.sum_sq = sum_sq;
    s.min = smaller(half_value(min & 0xffffu), half_value(min >> 16));
    s.max = larger(half_value(max & 0xffffu), half_value(max >> 16));
    s.zeros = half_value(zeros & 0xffffu) + half_value(zeros >> 16);
    return s;
  }
};

// The upper bit of each byte that is not 0.
__device__ inline uint32_t nonzero_bytes(uint32_t w) {
  return (((w & 0x7f7f7f7fu) + 0x7f7f7f7fu) | w) & 0x80808080u;
}

// Smaller and larger elements: whole words by their uppermost byte, or both halves by theirs. The
// bytes below it do not change which one it is.
template <int kCompared>
struct UpperBytes {  // one per word
  template <class Int>
  __device__ static Int smaller(Int a, Int b) {
    return a < b ? a : b;
  }
  template <class Int>
  __device__ static Int larger(Int a, Int b) {
    return a > b ? a : b;
  }
};
template <>
struct UpperBytes<2> {
  __device__ static int32_t smaller(int32_t a, int32_t b) { return __vmins2(a, b); }
  __device__ static int32_t larger(int32_t a, int32_t b) { return __vmaxs2(a, b); }
  __device__ static uint32_t smaller(uint32_t a, uint32_t b) { return __vminu2(a, b); }
  __device__ static uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
};

// Integers of one byte. Their sums are exact: a thread's fit in 32 bits, and float64 adds them.
template <class E>
struct ByteState {
  using Int = typename E::Int;
  using Upper = UpperBytes<E::kCompared>;
  static constexpr int kShifts = 4 / E::kCompared;  // that move each byte to an upper one
  Int sum = 0, sum_sq = 0, min[kShifts], max[kShifts];
  uint32_t nonzero = 0;  // 128 times the number of elements
  int taken = 0;

  __device__ explicit ByteState(const Words& first) {
#pragma unroll
    for (int k = 0; k < kShifts; ++k) min[k] = max[k] = static_cast<Int>(first.w[0] * 0x1010101u);
  }

  __device__ void add(uint32_t w) {
    const Int x = static_cast<Int>(w);
    sum = __dp4a(x, Int{0x1010101}, sum);
    sum_sq = __dp4a(x, x, sum_sq);
    nonzero = __dp4a(nonzero_bytes(w), 0x1010101u, nonzero);
  }

  __device__ void compare(uint32_t w) {
#pragma unroll
    for (int k = 0; k < kShifts; ++k) {
      min[k] = Upper::smaller(min[k], static_cast<Int>(w << (8 * k)));
      max[k] = Upper::larger(max[k], static_cast<Int>(w << (8 * k)));
    }
  }

  template <int kVectors>
  __device__ void take(const Words (&v)[kVectors], float) {
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) {
      add(v[i / 4].w[i % 4]);
      compare(v[i / 4].w[i % 4]);
    }
    taken += 16 * kVectors;
  }

  __device__ void take_one(const Words& v, float) {
    add(v.w[0]);
    compare(v.w[0] * 0x1010101u);
    ++taken;
  }

  // The upper byte of a word, or of its lower half.
  __device__ static float byte_of(Int word, int half) {
    return E::value(static_cast<uint32_t>(word) >> (24 - 16 * half) & 0xffu);
  }

  __device__ Sums<InFloat> sums() const {
    Sums<InFloat> s;
    s.sum = sum;
    s.sum_sq = sum_sq;
    s.min = byte_of(min[0], 0);
    s.max = byte_of(max[0], 0);
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      s.min = fminf(s.min, byte_of(min[i / E::kCompared], i % E::kCompared));
      s.max = fmaxf(s.max, byte_of(max[i / E::kCompared], i % E::kCompared));
    }
    s.zeros = static_cast<float>(taken - static_cast<int>(nonzero / 128));
    return s;
  }
};

// Bytes that are true or false. Every sum follows from the number of the true ones.
template <class E>
struct BoolState {
  uint32_t nonzero = 0;
  int taken = 0;
  float first;

  __device__ explicit BoolState(const Words& v) : first(E::value(v.w[0])) {}

  template <int kVectors>
  __device__ void take(const Words (&v)[kVectors], float) {
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) {
      nonzero = __dp4a(nonzero_bytes(v[i / 4].w[i % 4]), 0x1010101u, nonzero);
    }
    taken += 16 * kVectors;
  }

  __device__ void take_one(const Words& v, float) {
    nonzero += nonzero_bytes(v.w[0]);
    ++taken;
  }

  __device__ Sums<InFloat> sums() const {
    Sums<InFloat> s;
    s.sum = s.sum_sq = nonzero / 128;
    s.zeros = static_cast<float>(taken - static_cast<int>(nonzero / 128));
    s.min = s.zeros > 0 ? 0.0f : first;
    s.max = s.sum > 0 ? 1.0f : first;
    return s;
  }
};

}  // namespace paramstats::cuda
