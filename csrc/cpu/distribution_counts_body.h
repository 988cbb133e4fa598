// The counts of a part by sign and exponent, from the bytes of distribution_keys_body.h. A part of
// kernels_body.h, which includes it once per SIMD level and states the rules for its code.

// Where to add the counts of negative and of positive elements by biased exponent. Zeros, whose
// exponent is 0, are not counted.
struct PartCounts {
  int64_t *negative, *positive;
  int64_t all = 0;

  explicit PartCounts(int64_t* counts)
      : negative(counts - kBias - kNarrow.first), positive(negative + kNarrow.bins) {}
  void add(int exponent, int64_t negatives, int64_t positives) {
    negative[exponent] += negatives;
    positive[exponent] += positives;
    all += negatives + positives;
  }
};

inline void count_one_by_one(const PartBytes& bytes, int64_t n, int top, int bottom,
                             PartCounts& out) {
  int32_t tables[4][512] = {};  // increments of one table would wait for each other
  for (int64_t i = 0; i < n; i += 4) {
    for (int k = 0; k < 4; ++k) {
      ++tables[k][bytes.exponents[i + k] | (bytes.signs[i + k] & 8) << 5];
    }
  }
  for (int e = bottom; e <= top; ++e) {
    int64_t sums[2] = {};
    for (const auto& table : tables) {
      sums[0] += table[e];
      sums[1] += table[256 + e];
    }
    out.add(e, sums[0], sums[1]);
  }
}

#if defined(PARAMSTATS_LOOKUP)
constexpr int kGroupVectors = 15;                // whose counts fit in 4 bits
constexpr int kSumVectors = 16 * kGroupVectors;  // whose counts fit in 8 bits

inline UInt64Lanes sum_eight_bytes(UInt8Lanes v) {
#if defined(PARAMSTATS_SUM_EIGHT_BYTES)
  return (UInt64Lanes)PARAMSTATS_SUM_EIGHT_BYTES(v);
#else
  const UInt16Lanes pairs = ((UInt16Lanes)v & 0xff) + ((UInt16Lanes)v >> 8);
  const UInt32Lanes fours = ((UInt32Lanes)pairs & 0xffff) + ((UInt32Lanes)pairs >> 16);
  return ((UInt64Lanes)fours & 0xffffffff) + ((UInt64Lanes)fours >> 32);
#endif
}

// The sums of four vectors of bytes, in fields of 16 bits.
inline uint64_t bytes_sums(const UInt8Lanes (&v)[4]) {
  UInt64Lanes all = {};
  for (int k = 0; k < 4; ++k) all |= sum_eight_bytes(v[k]) << 16 * k;
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
    tables[0][l] = tables[1][l + 8] = 1;
    tables[0][l + 1] = tables[1][l + 9] = 16;
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

inline bool any_below_128(UInt8Lanes v) {
#if defined(PARAMSTATS_ANY_BELOW_128)
  return PARAMSTATS_ANY_BELOW_128(v);
#else
  return lanes_any((UInt8Lanes)(v < 128));
#endif
}

// Counts windows of 8 exponents. The index of an element in the window has its distance from the
// top in 3 bits, and its sign; that of any other element has bit 7, for which a lookup gives 0.
// Vectors without an element in the window are left out.
inline void count_windows(PartBytes& bytes, int64_t n, int top, int bottom, PartCounts& out) {
  for (; top >= bottom; top -= 8) {
    int64_t vectors = 0;
#pragma GCC unroll 2
    for (int64_t i = 0; i < n; i += kVectorBytes) {
      const UInt8Lanes sixteen = UInt8Lanes{} + 16;
      UInt8Lanes d = static_cast<uint8_t>(top) - load_as<UInt8Lanes>(bytes.exponents + i);
      d = ((d < sixteen ? d : sixteen) + 0x78) ^ load_as<UInt8Lanes>(bytes.signs + i);
      __builtin_memcpy(bytes.index + vectors * kVectorBytes, &d, kVectorBytes);
      vectors += any_below_128(d);
    }
    for (int d = 0; d < 8 && top - d >= bottom; d += 2) {
      int64_t pair[4] = {};
      count_pair(bytes.index, vectors, d, pair);
      const int e = top - d;
      out.add(e, pair[2], pair[0]);
      if (e > bottom) out.add(e - 1, pair[3], pair[1]);
    }
  }
}
#endif

inline void count_exponents(PartBytes& bytes, int64_t n, int top, int bottom, PartCounts& out) {
#if defined(PARAMSTATS_LOOKUP)
  constexpr int kMostExponents = 40;  // for more, one by one is faster
  if (top - bottom < kMostExponents) return count_windows(bytes, n, top, bottom, out);
#endif
  count_one_by_one(bytes, n, top, bottom, out);
}
