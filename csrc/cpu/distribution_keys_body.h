// The distribution of dtypes that float32 represents exactly, part by part in SIMD lanes. A part of
// kernels_body.h, which includes it once per SIMD level and states the rules for its code.
//
// A part is read three times; it stays in L1:
//
//  1. as 16-bit keys: sign, exponent and 7 digits of a float32, of which the last is set if any
//     further digit is. (Rounding to odd keeps the order of elements and thresholds.) They give the
//     largest element of each block of kMxBlock, hence what the low-precision formats lose; and the
//     exponents and signs as bytes.
//  2. as these bytes, for the counts: distribution_counts_body.h.
//  3. as float32, for the moments around a pivot near the mean (distribution_fast_body.h).
//
// Parts with NaN, infinity, the largest or the smallest numbers (below 2^-123, subnormal ones among
// them) are left to read_values.

constexpr int kStep = 2 * kMxBlock;                        // elements that are read together
constexpr int kKeys = kVectorBytes / 2;                    // in a vector
constexpr int kBlockVectors = kMxBlock / kKeys;            // of keys
constexpr int kBias = 127, kLargestExponent = 250;         // of float32; of a part, biased
constexpr uint16_t kNegatives = 0x808, kNoSigns = 0x7878;  // two bytes of PartBytes::signs

// Of a part of n elements, in any order.
struct PartBytes {
  uint8_t exponents[kPart], signs[kPart], index[kPart];
};

// ---- keys and low-precision formats ------------------------------------------------------------

// The lower halves of the lanes of `a`, and the upper ones of `b`.
inline UInt16Lanes blend_words(UInt32Lanes a, UInt32Lanes b) {
#if defined(PARAMSTATS_BLEND_WORDS)
  return PARAMSTATS_BLEND_WORDS(a, b);
#else
  return (UInt16Lanes)((a & 0xffffu) | (b & 0xffff0000u));
#endif
}
inline UInt16Lanes blend_bytes(UInt16Lanes a, UInt16Lanes b) {
#if defined(PARAMSTATS_BLEND_BYTES)
  return PARAMSTATS_BLEND_BYTES(a, b);
#else
  return (a & 0xff) | (b & 0xff00);
#endif
}
inline UInt16Lanes smaller(UInt16Lanes v, UInt16Lanes m) { return v < m ? v : m; }

inline UInt16Lanes keys_of(const uint16_t* x) { return load_as<UInt16Lanes>(x); }  // of bfloat16
inline UInt16Lanes keys_of(const float* x) {                                       // in any order
  const auto a = load_as<UInt32Lanes>(x), b = load_as<UInt32Lanes>(x + kKeys / 2);
  const UInt16Lanes rest = blend_words(a, b << 16), one = UInt16Lanes{} + 1;
  return blend_words(a >> 16, b) | smaller(rest, one);
}

// Keys in an order in which the largest |x| is the smallest, unsigned, and zeros are the last: 1 is
// that of the largest NaN. As signed integers, zeros are the first.
inline UInt16Lanes orders_of(UInt16Lanes keys) { return 0x8000 - (keys & 0x7fff); }

// The smallest lane, in all lanes.
inline UInt16Lanes smallest_word(UInt16Lanes v) {
#if defined(PARAMSTATS_SMALLEST_WORD)
  return PARAMSTATS_SMALLEST_WORD(v);
#else
  return UInt16Lanes{} + lanes_min(v);
#endif
}

inline UInt16Lanes minus_or_zero(UInt16Lanes a, UInt16Lanes b) {
#if defined(PARAMSTATS_MINUS_OR_ZERO)
  return PARAMSTATS_MINUS_OR_ZERO(a, b);
#else
  return a > b ? a - b : UInt16Lanes{};
#endif
}

// Lanes below 256 as bytes, in any order.
inline UInt8Lanes as_bytes(UInt16Lanes a, UInt16Lanes b) {
#if defined(PARAMSTATS_AS_BYTES)
  return PARAMSTATS_AS_BYTES(a, b);
#else
  return (UInt8Lanes)(a | b << 8);
#endif
}

// Counters of a chunk; 16 bits are enough for it.
struct MxLanes {
  UInt16Lanes flushed[kMxFormats] = {}, saturated[kMxFormats] = {};
};

constexpr int kFlushedDigits[kMxFormats] = {4, 18, 32};
static_assert(kMxFlushed[0] == 0x1p-4 * (1 << kMxMaxExponent[0]) &&
              kMxFlushed[1] == 0x1p-18 * (1 << kMxMaxExponent[1]) &&
              kMxFlushed[2] == 0x1p-32 * (1 << kMxMaxExponent[2]));
// 1.75, 1.8125 (and more) and 1.875 times the power of two of the block's largest element, as the
// lowest 7 bits of a key.
constexpr int kSaturatedKeys[kMxFormats] = {0x60, 0x69, 0x70};

struct PartKeys {
  int largest, smallest;              // |x| of all but zeros; 0 if there is none
  uint16_t blocks[kPart / kMxBlock];  // the order of the largest of each block
};

// The order that comes before those of keys that are flushed: of at most 2^-`digits` times the
// power of two of the block's largest key. `first`: that key's order, in all lanes. If that power
// is below 2^`digits`, the result has no meaning.
inline Int16Lanes last_kept(UInt16Lanes first, int digits) {
  const UInt16Lanes power = ~(first + 0x7fff) & 0x7f80;
  const auto limit = static_cast<uint16_t>(0x7fff + (digits << 7));
  return (Int16Lanes)(limit - power);
}

// Adds bytes to counters.
inline void add_bytes(UInt8Lanes v, UInt16Lanes& out) {
  out += ((UInt16Lanes)v & 0xff) + ((UInt16Lanes)v >> 8);
}

// Prefetches the part after the n elements at x, one half of it in each of two passes: what
// corresponds to elements [i, i + step) of this part. (The passes in between leave the memory its
// time.)
template <class S>
inline __attribute__((always_inline)) void prefetch_half(const S* x, int64_t n, int half, int64_t i,
                                                         int64_t step) {
  const auto* next = reinterpret_cast<const char*>(x + n + (half * n + i) / 2);
#pragma GCC unroll 4
  for (int64_t b = 0; b < static_cast<int64_t>(step * sizeof(S) / 2); b += 64) {
    __builtin_prefetch(next + b, 0, 2);
  }
}

template <class S>
inline void read_keys(const S* x, int64_t n, MxLanes& mx, PartKeys& out, PartBytes& bytes) {
  constexpr int64_t kInBytes = 255 * kVectorBytes / kStep * kStep;  // counted in bytes
  UInt16Lanes flushed = mx.flushed[0], largest = UInt16Lanes{} + 0x8000;
  auto smallest = (Int16Lanes)largest;
  for (int64_t begin = 0; begin < n; begin += kInBytes) {
    const int64_t end = begin + kInBytes < n ? begin + kInBytes : n;
    UInt8Lanes saturated[kMxFormats] = {};
    for (int64_t i = begin; i < end; i += kStep) {
      UInt16Lanes keys[2 * kBlockVectors], above[2 * kBlockVectors];
      prefetch_half(x, n, 0, i, kStep);
#pragma GCC unroll 8
      for (int b = 0; b < 2; ++b) {
        UInt16Lanes orders[kBlockVectors], first = {};
#pragma GCC unroll 8
        for (int k = 0; k < kBlockVectors; ++k) {
          keys[b * kBlockVectors + k] = keys_of(x + i + b * kMxBlock + k * kKeys);
          orders[k] = orders_of(keys[b * kBlockVectors + k]);
          first = k == 0 ? orders[0] : smaller(orders[k], first);
          smallest = (Int16Lanes)orders[k] > smallest ? (Int16Lanes)orders[k] : smallest;
        }
        largest = smaller(first, largest);
        first = smallest_word(first);
        out.blocks[i / kMxBlock + b] = first[0];
        const Int16Lanes kept = last_kept(first, kFlushedDigits[0]);
        // Of the order of the smallest that a format saturates, the next one.
        const UInt16Lanes limit =
            static_cast<uint16_t>(0x8001 - kSaturatedKeys[0]) - (~(first + 0x7fff) & 0x7f80);
#pragma GCC unroll 8
        for (int k = 0; k < kBlockVectors; ++k) {
          flushed -= (UInt16Lanes)((Int16Lanes)orders[k] > kept);
          above[b * kBlockVectors + k] = minus_or_zero(limit, orders[k]);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kBlockVectors; ++k) {
        const auto in_bytes = (Int8Lanes)as_bytes(above[2 * k], above[2 * k + 1]);
#pragma GCC unroll 3
        for (int f = 0; f < kMxFormats; ++f) {
          saturated[f] -=
              (UInt8Lanes)(in_bytes > (Int8Lanes{} +
                                       static_cast<int8_t>(kSaturatedKeys[f] - kSaturatedKeys[0])));
        }
        const UInt16Lanes a = keys[2 * k], b = keys[2 * k + 1];
        const UInt16Lanes exponents = blend_bytes(a >> 7, b << 1);
        const UInt16Lanes signs = (blend_bytes(a >> 8, b) >> 4 & kNegatives) ^ kNoSigns;
        __builtin_memcpy(bytes.exponents + i + k * kVectorBytes, &exponents, kVectorBytes);
        __builtin_memcpy(bytes.signs + i + k * kVectorBytes, &signs, kVectorBytes);
      }
    }
    for (int f = 0; f < kMxFormats; ++f) add_bytes(saturated[f], mx.saturated[f]);
  }
  mx.flushed[0] = flushed;
  out.largest = 0x8000 - lanes_min(largest);
  out.smallest = (0x8000 - lanes_max(smallest)) & 0xffff;
}

// Counts what float8 formats flush, which is little: of most parts, nothing.
template <class S>
__attribute__((noinline)) void count_small(const S* x, int64_t n, const PartKeys& keys,
                                           MxLanes& mx) {
  for (int64_t i = 0; i < n; i += kMxBlock) {
    for (int f = 1; f < kMxFormats; ++f) {
      const uint16_t first = keys.blocks[i / kMxBlock];
      if (first > 0x8000 - (kFlushedDigits[f] << 7)) continue;  // last_kept has no meaning
      const Int16Lanes kept = last_kept(UInt16Lanes{} + first, kFlushedDigits[f]);
      for (int k = 0; k < kBlockVectors; ++k) {
        const auto orders = (Int16Lanes)orders_of(keys_of(x + i + k * kKeys));
        mx.flushed[f] -= (UInt16Lanes)(orders > kept);
      }
    }
  }
}
