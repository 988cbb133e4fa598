// The kernels of 8-bit integers and bool. A part of kernels_body.h, which includes it once per SIMD
// level and states the rules for its code.
//
// Sums of bytes are exact in integers. They need no pivot and no second read:
//
//     mean = sum(x) / n           m2 = (n sum(x^2) - sum(x)^2) / n
//
// All dtypes are summed as unsigned bytes, int8 as x + 128, which changes neither order nor m2.

constexpr int kStripe = 64;  // bytes that are read together
// Stripes that are summed in narrow lanes. A 16-bit lane adds at most 2 * 255 per vector.
constexpr int kStripes = 128 / (kStripe / kVectorBytes);

struct ByteLanes {
  UInt8Lanes zeros = {};
  UInt16Lanes sum = {};
  UInt32Lanes squares[2] = {};
};

inline void add_bytes(ByteLanes& lanes, UInt8Lanes v) {
#if defined(PARAMSTATS_ADD_BYTES)
  PARAMSTATS_ADD_BYTES(lanes.sum, lanes.squares, v);
#else
  const UInt16Lanes even = (UInt16Lanes)v & 0xff, odd = (UInt16Lanes)v >> 8;
  lanes.sum += even + odd;
#if defined(PARAMSTATS_SUM_OF_SQUARES)
  lanes.squares[0] += (UInt32Lanes)PARAMSTATS_SUM_OF_SQUARES(even);
  lanes.squares[1] += (UInt32Lanes)PARAMSTATS_SUM_OF_SQUARES(odd);
#else
  const UInt32Lanes a = (UInt32Lanes)(even * even), b = (UInt32Lanes)(odd * odd);
  lanes.squares[0] += (a & 0xffff) + (a >> 16);
  lanes.squares[1] += (b & 0xffff) + (b >> 16);
#endif
#endif
}

// The sums of a chunk of bytes of type S: int8_t, uint8_t or bool.
template <class S>
struct Bytes {
  static constexpr bool kBool = static_cast<S>(2) == 1;  // every byte but 0 is true
  static constexpr uint8_t kZero = static_cast<S>(-1) < 0 ? 128 : 0;
  UInt8Lanes min = ~UInt8Lanes{}, max = {};
  int64_t zeros = 0, sum = 0, squares = 0;

  void take(const uint8_t* x, ByteLanes& lanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kStripe; k += kVectorBytes) {
      UInt8Lanes v;
      __builtin_memcpy(&v, x + k, sizeof(v));
      if (kZero != 0) v ^= kZero;
      min = v < min ? v : min;
      max = v > max ? v : max;
      lanes.zeros -= (UInt8Lanes)(v == kZero);
      if (!kBool) add_bytes(lanes, v);
    }
  }
  void add(const ByteLanes& lanes) {
    zeros += lanes_sum(lanes.zeros);
    sum += lanes_sum(lanes.sum);
    squares += lanes_sum(lanes.squares[0] + lanes.squares[1]);
  }
  // Adds n < kStripe bytes. The stripe is filled with the first one, which is excluded again.
  void take_remainder(const uint8_t* x, int64_t n) {
    const int64_t first = x[0] ^ kZero, padding = kStripe - n;
    uint8_t padded[kStripe];
    for (uint8_t& byte : padded) byte = x[0];
    __builtin_memcpy(padded, x, n);
    ByteLanes lanes;
    take(padded, lanes);
    add(lanes);
    if (first == kZero) zeros -= padding;
    sum -= padding * first;
    squares -= padding * first * first;
  }
  Moments moments(int64_t n) const {
    const int64_t s = kBool ? n - zeros : sum, sq = kBool ? s : squares;
    const int lowest = lanes_min(min), highest = lanes_max(max);
    Moments out;
    out.count = n;
    out.zeros = zeros;
    out.mean = static_cast<double>(s - n * kZero) / static_cast<double>(n);
    out.m2 = static_cast<double>(n * sq - s * s) / static_cast<double>(n);
    out.min = kBool ? lowest != 0 : lowest - kZero;
    out.max = kBool ? highest != 0 : highest - kZero;
    return out;
  }
};

template <class S>
Moments chunk_of_bytes(const void* data, int64_t n) {
  const auto* x = static_cast<const uint8_t*>(data);
  Bytes<S> bytes;
  int64_t i = 0;
  while (i + kStripe <= n) {
    ByteLanes lanes;
    for (int k = 0; k < kStripes && i + kStripe <= n; ++k, i += kStripe) {
      __builtin_prefetch(x + i + kPrefetchBytes);
      bytes.take(x + i, lanes);
    }
    bytes.add(lanes);
  }
  if (i < n) bytes.take_remainder(x + i, n - i);
  return bytes.moments(n);
}
