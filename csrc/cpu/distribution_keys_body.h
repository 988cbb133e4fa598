// The distribution of dtypes that float32 represents exactly, part by part in SIMD lanes. A part of
// kernels_body.h, which includes it once per SIMD level and states the rules for its code.
//
// A part is read three times; it stays in L1:
//
//  1. as 16-bit keys: sign, exponent and 7 digits of a float32, of which the last is set if any
//     further digit is. (Rounding to odd keeps the order of elements and thresholds.) They give the
//     largest element of each block of kMxBlock, hence what the low-precision formats lose; and the
//     exponents and signs as bytes.
//  2. as these bytes, for the counts: see count_pairs.
//  3. as float32, for the moments around a pivot near the mean (distribution_fast_body.h).
//
// Parts with NaN, infinity, subnormal or the largest numbers are left to read_values.

constexpr int kStep = 2 * kMxBlock;                         // elements that are read together
constexpr int kKeys = kVectorBytes / 2;                     // in a vector
constexpr int kBlockVectors = kMxBlock / kKeys;             // of keys
constexpr int kBias = 127, kLargestExponent = 250;          // of float32; of a part, biased
constexpr uint16_t kNegative = 8, kNegativeAbove = 8 << 8;  // in PartBytes::signs

// Of a part of n elements, in any order.
struct PartBytes {
  uint8_t exponents[kPart], signs[kPart], index[kPart];
};

// ---- keys and low-precision formats ------------------------------------------------------------

inline UInt16Lanes keys_of(const uint16_t* x) { return load_as<UInt16Lanes>(x); }  // of bfloat16
inline UInt16Lanes keys_of(const float* x) {                                       // in any order
  const auto a = load_as<UInt32Lanes>(x), b = load_as<UInt32Lanes>(x + kKeys / 2);
  const auto keys = (UInt16Lanes)(a >> 16 | (b & 0xffff0000u));
  const auto rest = (UInt16Lanes)((a & 0xffffu) | b << 16), one = UInt16Lanes{} + 1;
  return keys | (rest < one ? rest : one);
}

inline int largest_of(UInt16Lanes v) {
#if defined(PARAMSTATS_LARGEST_WORD)
  return PARAMSTATS_LARGEST_WORD(v);
#else
  return lanes_max(v);
#endif
}

// Counters of a chunk; 16 bits are enough for it.
struct MxLanes {
  UInt16Lanes flushed[kMxFormats] = {}, saturated[kMxFormats] = {};
};

// Keys of |x| as signed integers in an order in which 0 is the largest: 1 is -2^15.
inline Int16Lanes zero_last(UInt16Lanes size) { return (Int16Lanes)(size + 0x7fff); }

// Keys below the result, as by zero_last, are flushed: those of at most 2^-`digits` times the
// power of two of the block's largest key.
inline Int16Lanes first_kept(int largest, int digits) {
  const int flushed = (largest & 0x7f80) - (digits << 7);
  return Int16Lanes{} + static_cast<int16_t>((flushed > 0 ? flushed : 0) - 0x8000);
}

constexpr int kFlushedDigits[kMxFormats] = {4, 18, 32};
static_assert(kMxFlushed[0] == 0x1p-4 * (1 << kMxMaxExponent[0]) &&
              kMxFlushed[1] == 0x1p-18 * (1 << kMxMaxExponent[1]) &&
              kMxFlushed[2] == 0x1p-32 * (1 << kMxMaxExponent[2]));

struct PartKeys {
  int largest = 0, smallest = 0x7fff;  // of all but zeros
  int blocks[kPart / kMxBlock];        // the largest of each block
};

template <class S>
inline void read_keys(const S* x, int64_t n, MxLanes& mx, PartKeys& out, PartBytes& bytes) {
  MxLanes lanes = mx;
  Int16Lanes smallest = Int16Lanes{} + 0x7fff;
  for (int64_t i = 0; i < n; i += kStep) {
    UInt16Lanes keys[2 * kBlockVectors];
#pragma GCC unroll 8
    for (int b = 0; b < 2; ++b) {
      UInt16Lanes sizes[kBlockVectors], top = {};
#pragma GCC unroll 8
      for (int k = 0; k < kBlockVectors; ++k) {
        keys[b * kBlockVectors + k] = keys_of(x + i + b * kMxBlock + k * kKeys);
        sizes[k] = keys[b * kBlockVectors + k] & 0x7fff;
        top = sizes[k] > top ? sizes[k] : top;
      }
      const int largest = largest_of(top);
      out.blocks[i / kMxBlock + b] = largest;
      out.largest = largest > out.largest ? largest : out.largest;
      const Int16Lanes kept = first_kept(largest, kFlushedDigits[0]);
      const Int16Lanes power = Int16Lanes{} + static_cast<int16_t>(largest & 0x7f80);
#pragma GCC unroll 8
      for (int k = 0; k < kBlockVectors; ++k) {
        const Int16Lanes order = zero_last(sizes[k]), digits = (Int16Lanes)sizes[k] - power;
        smallest = order < smallest ? order : smallest;
        lanes.flushed[0] -= (UInt16Lanes)(order < kept);
        lanes.saturated[0] -= (UInt16Lanes)(digits >= 0x60);  // 1.75, 1.8125 and 1.875 times the
        lanes.saturated[1] -= (UInt16Lanes)(digits > 0x68);   // power of two
        lanes.saturated[2] -= (UInt16Lanes)(digits >= 0x70);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kBlockVectors; ++k) {
      const UInt16Lanes a = keys[2 * k], b = keys[2 * k + 1];
      const UInt16Lanes exponents = (a >> 7 & 0xff) | (b << 1 & 0xff00);
      const UInt16Lanes signs = (a >> 12 & kNegative) | (b >> 4 & kNegativeAbove);
      __builtin_memcpy(bytes.exponents + i + k * kVectorBytes, &exponents, kVectorBytes);
      __builtin_memcpy(bytes.signs + i + k * kVectorBytes, &signs, kVectorBytes);
    }
  }
  out.smallest = lanes_min(smallest) + 0x8001;
  mx = lanes;
}

// Counts what float8 formats flush, which is little: of most parts, nothing.
template <class S>
__attribute__((noinline)) void count_small(const S* x, int64_t n, const PartKeys& keys,
                                           MxLanes& mx) {
  for (int64_t i = 0; i < n; i += kMxBlock) {
    const int largest = keys.blocks[i / kMxBlock];
    const Int16Lanes kept[] = {first_kept(largest, kFlushedDigits[1]),
                               first_kept(largest, kFlushedDigits[2])};
    for (int k = 0; k < kBlockVectors; ++k) {
      const Int16Lanes order = zero_last(keys_of(x + i + k * kKeys) & 0x7fff);
      mx.flushed[1] -= (UInt16Lanes)(order < kept[0]);
      mx.flushed[2] -= (UInt16Lanes)(order < kept[1]);
    }
  }
}

// ---- counts ------------------------------------------------------------------------------------

// counts[exponent] of positive elements, counts[256 + exponent] of negative ones.
inline void count_one_by_one(const PartBytes& bytes, int64_t n, int64_t* counts) {
  int32_t tables[4][512] = {};  // increments of one table would wait for each other
  for (int64_t i = 0; i < n; i += 4) {
    for (int k = 0; k < 4; ++k) {
      ++tables[k][bytes.exponents[i + k] | bytes.signs[i + k] << 5];
    }
  }
  for (int e = 0; e < 512; ++e) {
    counts[e] += tables[0][e] + tables[1][e] + tables[2][e] + tables[3][e];
  }
}

#if defined(PARAMSTATS_LOOKUP)
constexpr int kGroupVectors = 15;                // whose counts fit in 4 bits
constexpr int kSumVectors = 16 * kGroupVectors;  // whose counts fit in 8 bits

// The sums of four vectors of bytes, in fields of 16 bits.
inline uint64_t bytes_sums(const UInt8Lanes (&v)[4]) {
  typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
  UInt32Lanes sums[4];
  for (int k = 0; k < 4; ++k) {
    const UInt16Lanes pairs = ((UInt16Lanes)v[k] & 0xff) + ((UInt16Lanes)v[k] >> 8);
    sums[k] = ((UInt32Lanes)pairs & 0xffff) + ((UInt32Lanes)pairs >> 16);
  }
  const auto a = (Words)(sums[0] | sums[1] << 16), b = (Words)(sums[2] | sums[3] << 16);
  const Words all = ((a & 0xffffffffu) + (a >> 32)) | ((b & 0xffffffffu) + (b >> 32)) << 32;
  return static_cast<uint64_t>(lanes_sum(all));
}

// Adds the lookups of `n` vectors in both tables.
inline __attribute__((always_inline)) void add_lookups(const uint8_t* index, int64_t n,
                                                       const UInt8Lanes (&tables)[2],
                                                       UInt8Lanes (&sums)[2]) {
#pragma GCC unroll 15
  for (int64_t k = 0; k < n; ++k) {
    const auto v = load_as<UInt8Lanes>(index + k * kVectorBytes);
    sums[0] += PARAMSTATS_LOOKUP(tables[0], v);
    sums[1] += PARAMSTATS_LOOKUP(tables[1], v);
  }
}

// Counts the elements `first` and `first` + 1 below the top of the window, of either sign. A table
// gives 1 for one of them and 16 for the other, so that one sum of bytes is two of 4 bits.
inline void count_pair(const uint8_t* index, int64_t vectors, int first, int64_t (&counts)[4]) {
  UInt8Lanes tables[2] = {};
  for (int l = first; l < kVectorBytes; l += 16) {
    tables[0][l] = tables[1][l + kNegative] = 1;
    tables[0][l + 1] = tables[1][l + kNegative + 1] = 16;
  }
  for (int64_t begin = 0; begin < vectors; begin += kSumVectors) {
    const int64_t end = begin + kSumVectors < vectors ? begin + kSumVectors : vectors;
    UInt8Lanes all[2] = {}, second[2] = {};  // `all`: the first, and 16 times the second
    for (int64_t i = begin; i < end; i += kGroupVectors) {
      UInt8Lanes sums[2] = {};
      if (i + kGroupVectors <= end) {
        add_lookups(index + i * kVectorBytes, kGroupVectors, tables, sums);
      } else {
        add_lookups(index + i * kVectorBytes, end - i, tables, sums);
      }
      for (int s = 0; s < 2; ++s) {
        all[s] += sums[s];
        second[s] += sums[s] >> 4;
      }
    }
    const uint64_t sums =
        bytes_sums({all[0] - (second[0] << 4), second[0], all[1] - (second[1] << 4), second[1]});
    for (int k = 0; k < 4; ++k) counts[k] += sums >> (16 * k) & 0xffff;
  }
}

// Counts windows of 8 exponents. The index of an element in the window has its distance from the
// top in 3 bits, and its sign; that of any other element has bit 7, for which a lookup gives 0.
inline void count_windows(PartBytes& bytes, int64_t n, int top, int bottom, int64_t* counts) {
  for (; top >= bottom; top -= 8) {
    for (int64_t i = 0; i < n; i += kVectorBytes) {
      const UInt8Lanes sixteen = UInt8Lanes{} + 16;
      UInt8Lanes d = static_cast<uint8_t>(top) - load_as<UInt8Lanes>(bytes.exponents + i);
      d = ((d < sixteen ? d : sixteen) + 0x78) ^ load_as<UInt8Lanes>(bytes.signs + i) ^ 0x78;
      __builtin_memcpy(bytes.index + i, &d, kVectorBytes);
    }
    for (int d = 0; d < 8 && top - d >= bottom; d += 2) {
      int64_t pair[4] = {};
      count_pair(bytes.index, n / kVectorBytes, d, pair);
      const int e = top - d;
      counts[e] += pair[0];
      counts[256 + e] += pair[2];
      if (e == bottom) break;
      counts[e - 1] += pair[1];
      counts[256 + e - 1] += pair[3];
    }
  }
}
#endif

inline void count_exponents(PartBytes& bytes, int64_t n, [[maybe_unused]] int top,
                            [[maybe_unused]] int bottom, int64_t* counts) {
#if defined(PARAMSTATS_LOOKUP)
  constexpr int kMostExponents = 40;  // for more, one by one is faster
  if (top - bottom < kMostExponents) return count_windows(bytes, n, top, bottom, counts);
#endif
  count_one_by_one(bytes, n, counts);
}
