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
//  3. as float32, for the moments around a pivot near the mean: see power_sums.
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

// ---- moments -----------------------------------------------------------------------------------

// Sums of powers of d = (x - pivot) * scale, and of |x|. With u = 2^-24, d has one rounding, d^2
// three, d^3 four or five, and d^4 seven. A lane adds 8 terms (7 roundings), and then 2 vectors
// (1). So the errors are below 9u sum|d|, 11u sum(d^2), 13u sum|d|^3 and 15u sum(d^4), and that of
// sum|x| is below 8u sum|x|.
//
// The sums are accepted if the shift to the mean is at most s / 8, s = std of the part. Then
//
//   mean   has an error of at most 9u (1 + 1/64)^(1/2) s < 9.2u s,
//   m2     of at most (11 (1 + 1/64) + 2/8 * 9.2) u m2 < 14u m2,
//   m3     of 13u sum|d|^3 + (3/8 * 11.2 + 3 * 9.2 * 1.02 + 6/64 * 9.2) u n s^3. By the
//          inequality of Cauchy and Schwarz sum|d|^3 <= (sum(d^2) sum(d^4))^(1/2), which is at
//          most (9/8)^3 n s^3 kurtosis^(1/2). So the error is below 52u n s^3 kurtosis^(1/2).
//
// The error of skewness = m3 / (n s^3) is then below 52u + 1.5 * 14u, and 28u for the means of the
// parts that are merged: 101u kurtosis^(1/2) = 6.1e-6 kurtosis^(1/2). In the same way the error of
// kurtosis is below (15 (9/8)^4 + 4/8 * 13 (9/8)^3 + 6/64 * 11 + 4 * 9.2 + 2 * 14 + 4 * 9.2) u
// kurtosis = 137u kurtosis = 8.2e-6 kurtosis.
constexpr double kLargestShiftShare = 1.0 / 64;  // of the squares

template <class T>
struct LanePowers {
  typename T::Vector d1, d2, d3, d4, abs;

  LanePowers operator+(const LanePowers& o) const {
    return {d1 + o.d1, d2 + o.d2, d3 + o.d3, d4 + o.d4, abs + o.abs};
  }
};

template <class T, bool kIsFirst>
inline __attribute__((always_inline)) void add_powers(const typename T::Storage* x,
                                                      typename T::Vector scale,
                                                      typename T::Vector pivot,
                                                      LanePowers<T> (&out)[2]) {
  using V = typename T::Vector;
#pragma GCC unroll 2
  for (int k = 0; k < 2; k += T::kVectors) {
    V v[T::kVectors];
    T::load(x + k * T::kWidth, v);
#pragma GCC unroll 2
    for (int j = 0; j < T::kVectors; ++j) {
      LanePowers<T>& sums = out[k + j];
      const V d = v[j] * scale - pivot, square = d * d;
      const V size = as_float((UInt32Lanes)v[j] & 0x7fffffffu);
      sums.d1 = kIsFirst ? d : sums.d1 + d;
      sums.d2 = kIsFirst ? square : sums.d2 + square;
      sums.d3 = kIsFirst ? square * d : sums.d3 + square * d;
      sums.d4 = kIsFirst ? square * square : sums.d4 + square * square;
      sums.abs = kIsFirst ? size : sums.abs + size;
    }
  }
}

template <class T>
inline PowerSums power_sums(const typename T::Storage* x, int64_t n, float scale, float pivot) {
  using V = typename T::Vector;
  constexpr int kGroup = 2 * T::kWidth, kTile = cpu::kInner * kGroup;
  const V scales = V{} + scale, pivots = V{} + pivot;
  DoubleLanes d1 = {}, d2 = {}, d3 = {}, d4 = {}, abs = {};
  for (int64_t i = 0; i < n; i += kTile) {
    LanePowers<T> of[2];
    add_powers<T, true>(x + i, scales, pivots, of);
    if (i + kTile <= n) {
#pragma GCC unroll 8
      for (int g = 1; g < cpu::kInner; ++g) {
        add_powers<T, false>(x + i + g * kGroup, scales, pivots, of);
      }
    } else {
      for (int64_t k = i + kGroup; k < n; k += kGroup) {
        add_powers<T, false>(x + k, scales, pivots, of);
      }
    }
    const LanePowers<T> sums = of[0] + of[1];
    d1 += widened(sums.d1);
    d2 += widened(sums.d2);
    d3 += widened(sums.d3);
    d4 += widened(sums.d4);
    abs += widened(sums.abs);
  }
  return {lanes_total(d1), lanes_total(d2), lanes_total(d3), lanes_total(d4), lanes_total(abs)};
}

// Computes the moments of a part whose largest exponent (biased) is given; `mean` is a guess.
// Returns false if no pivot was close enough to the mean.
template <class T>
inline bool part_moments(const typename T::Storage* x, int64_t n, int exponent, double mean,
                         HigherMoments& out) {
  constexpr int kTries = 4;
  // |x| scale < 1. If d is not 0 for all elements, it is at least 2^-25 for one, so that underflow
  // does not matter.
  const double unscale = from_bits(static_cast<uint64_t>(1023 + exponent - kBias + 1) << 52);
  const auto scale = static_cast<float>(1 / unscale);
  auto pivot = static_cast<float>(mean / unscale);
  if (!(pivot > -1 && pivot < 1)) pivot = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const PowerSums s = power_sums<T>(x, n, scale, pivot);
    const double shift = s.d1 / static_cast<double>(n);
    if (s.d1 * shift <= s.d2 * kLargestShiftShare) {
      out = centered(s, n, pivot);
      const double square = unscale * unscale;
      out.mean *= unscale;
      out.m2 *= square;
      out.m3 *= square * unscale;
      out.m4 *= square * square;
      return true;
    }
    pivot = static_cast<float>(pivot + shift);
  }
  return false;
}

// ---- parts and chunks --------------------------------------------------------------------------

// Reads a part of which n is a multiple of kStep. Returns false if the lanes cannot represent it.
template <class T>
inline bool read_part(const typename T::Storage* x, int64_t n, MxLanes& mx, double& mean,
                      PartBytes& bytes, ChunkDistribution& out) {
  MxLanes lanes = mx;
  PartKeys keys;
  read_keys(x, n, lanes, keys, bytes);
  const int top = keys.largest >> 7, bottom = keys.smallest >> 7;
  HigherMoments moments;
  moments.n = n;
  if (keys.largest != 0) {
    if (top > kLargestExponent || bottom == 0) return false;
    if (!part_moments<T>(x, n, top, mean, moments)) return false;
    if (keys.smallest <= keys.largest - (kFlushedDigits[1] - 1) * 128) {
      count_small(x, n, keys, lanes);
    }
    int64_t counts[512] = {};
    count_exponents(bytes, n, top, bottom, counts);
    for (int e = bottom; e <= top; ++e) {
      const int bin = e - kBias - kNarrow.first;
      out.counts[bin] += counts[256 + e];
      out.counts[kNarrow.bins + bin] += counts[e];
    }
  }
  mx = lanes;
  mean = moments.mean;
  out.moments = merge(out.moments, moments);
  return true;
}

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

template <class T>
void distribution(const void* data, int64_t n, ChunkDistribution& out) {
  const auto* x = static_cast<const typename T::Storage*>(data);
  using Storage = typename T::Storage;
  constexpr bool kWide64 = sizeof(Storage) == 8 && !Values<T>::kWhole;
  MxLanes mx;
  double mean = 0;
  PartBytes bytes;
  for (int64_t i = 0; i < n;) {
    int64_t size = n - i < kPart ? n - i : kPart;
    bool done = false;
    if constexpr (!Values<T>::kWhole && sizeof(Storage) <= 4) {
      const int64_t steps = size / kStep * kStep;
      if (steps > 0) {
        if constexpr (sizeof(Storage) == 4 || kIsBFloat16<T>) {
          done = read_part<T>(x + i, steps, mx, mean, bytes, out);
        } else {
          auto* const floats = reinterpret_cast<float*>(scratch());
          convert<T>(x + i, steps, floats);
          done = read_part<Native<float, InFloat>>(floats, steps, mx, mean, bytes, out);
        }
        if (done) size = steps;
      }
    }
    if (!done) {
      Values<T>::of(x + i, size, scratch());
      read_values(scratch(), size, kWide64 ? kWide : kNarrow, out);
    }
    i += size;
  }
  for (int f = 0; f < kMxFormats; ++f) {
    out.mx[f].underflow += lanes_sum(mx.flushed[f]);
    out.mx[f].overflow += lanes_sum(mx.saturated[f]);
  }
}
