// The distribution of a chunk: counts by exponent, higher moments, and what low-precision formats
// would lose. A part of kernels_body.h, which includes it once per SIMD level and states the rules
// for its code.
//
// This file converts elements to float64 and reads them one by one. distribution_fast_body.h reads
// parts of the dtypes that float32 represents exactly, and uses this file for what it cannot read.

// Integers and bool, read one by one.
template <class S>
struct Whole {
  using Storage = S;
};

// Converts n elements to float64, or those of dtypes that float32 represents exactly to float32.
// The only rounding is that of integers above 2^53, which are rounded to odd: if any of the bits
// that do not fit is set, the last one that fits is set for them. This keeps the order of the
// integer and of all numbers that have fewer digits.
template <class T>
struct Values {
  static constexpr bool kWhole = false;
  template <class Out>
  static void of(const typename T::Storage* x, int64_t n, Out* out) {
    convert<T>(x, n, out);
  }
};
template <class S>
struct Values<Whole<S>> {
  static constexpr bool kWhole = true;
  template <class Out>
  static void of(const S* x, int64_t n, Out* out) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(S) == 8) {
        const S value = element_at(x + i);
        const bool negative = value < 0;
        uint64_t m = negative ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
        if (m >> 53) {
          const uint64_t rest = (uint64_t{1} << (11 - __builtin_clzll(m))) - 1;
          m = (m | ((m & rest) + rest)) & ~rest;
        }
        out[i] = negative ? -static_cast<double>(m) : static_cast<double>(m);
      } else if constexpr (static_cast<S>(2) == 1) {  // bool: every byte but 0 is true
        out[i] = reinterpret_cast<const uint8_t*>(x)[i] != 0;
      } else {
        out[i] = static_cast<Out>(element_at(x + i));
      }
    }
  }
};

// floor(log2 |x|) of a finite x != 0.
inline int exponent_of(double x) {
  const uint64_t bits = bits_of(x) & ~(uint64_t{1} << 63);
  const int biased = static_cast<int>(bits >> 52);
  return biased != 0 ? biased - 1023 : 63 - __builtin_clzll(bits) - 1074;
}

// Counts the n <= kMxBlock elements of a block that each format would flush or saturate.
inline void count_mx(const double* x, int64_t n, MxCounts* out) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double size = __builtin_fabs(x[i]);
    if (size <= kLargest && size > largest) largest = size;
  }
  if (largest == 0) return;
  // Multiplies by 2^-exponent, which may be beyond the largest number, in two steps. A product that
  // underflows is still below every threshold.
  const int exponent = exponent_of(largest);
  const double first = exponent < -900 ? 0x1p200 : 1;
  const double second = __builtin_ldexp(1, -exponent - (exponent < -900 ? 200 : 0));
  for (int64_t i = 0; i < n; ++i) {
    const double y = __builtin_fabs(x[i]) * first * second;  // largest: 1 <= y < 2
    if (!is_finite(x[i]) || x[i] == 0) continue;
    for (int f = 0; f < kMxFormats; ++f) {
      const double unit = static_cast<double>(1 << kMxMaxExponent[f]);
      out[f].underflow += y <= kMxFlushed[f] / unit;
      out[f].overflow += y >= kMxSaturated[f] / unit;
    }
  }
}

// Reads n <= kPart elements, which may have any value.
inline void read_values(const double* values, int64_t n, const ExponentRange& range, Moments& all,
                        ChunkDistribution& out) {
  Moments state;
  update(state, values, n);
  // Sums of |x| that would overflow are divided by a power of two.
  const double scale = state.max > 1e300 || state.min < -1e300 ? 0x1p-64 : 1;
  PowerSums sums;
  for (int64_t i = 0; i < n; ++i) {
    const double x = values[i];
    if (!is_finite(x)) continue;
    const double d = x - state.mean, d2 = d * d;
    sums.d1 += d;
    sums.d2 += d2;
    sums.d3 += d2 * d;
    sums.d4 += d2 * d2;
    sums.abs += __builtin_fabs(x) * scale;
    if (x != 0) ++out.counts[(x < 0 ? 0 : range.bins) + exponent_of(x) - range.first];
  }
  if (finite_count(state) > 0) {
    HigherMoments moments = centered(sums, finite_count(state), state.mean);
    moments.mean = state.mean;
    moments.abs_mean /= scale;
    out.moments = merge(out.moments, moments);
  }
  all = merge(all, state);
  for (int64_t i = 0; i < n; i += kMxBlock) {
    count_mx(values + i, n - i < kMxBlock ? n - i : kMxBlock, out.mx);
  }
}
