// The moments of a part in SIMD lanes, and the kernel of distributions. A part of kernels_body.h,
// which includes it once per SIMD level and states the rules for its code.

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

// kMoved = false: d = x.
template <class T, bool kMoved>
struct PowerReader {
  using V = typename T::Vector;
  static constexpr int kGroup = 2 * T::kWidth, kTile = cpu::kInner * kGroup;
  V scale, pivot;

  template <bool kIsFirst>
  inline __attribute__((always_inline)) void take(const typename T::Storage* x,
                                                  LanePowers<T> (&out)[2]) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; k += T::kVectors) {
      V v[T::kVectors];
      T::load(x + k * T::kWidth, v);
#pragma GCC unroll 2
      for (int j = 0; j < T::kVectors; ++j) {
        LanePowers<T>& sums = out[k + j];
        const V d = kMoved ? v[j] * scale - pivot : v[j], square = d * d;
        const V size = as_float((UInt32Lanes)v[j] & 0x7fffffffu);
        sums.d1 = kIsFirst ? d : sums.d1 + d;
        sums.d2 = kIsFirst ? square : sums.d2 + square;
        sums.d3 = kIsFirst ? square * d : sums.d3 + square * d;
        sums.d4 = kIsFirst ? square * square : sums.d4 + square * square;
        sums.abs = kIsFirst ? size : sums.abs + size;
      }
    }
  }
  inline __attribute__((always_inline)) LanePowers<T> tile(const typename T::Storage* x,
                                                           int64_t n) {
    LanePowers<T> of[2];
    take<true>(x, of);
    if (n >= kTile) {
#pragma GCC unroll 8
      for (int g = 1; g < cpu::kInner; ++g) take<false>(x + g * kGroup, of);
    } else {
      for (int64_t k = kGroup; k < n; k += kGroup) take<false>(x + k, of);
    }
    return of[0] + of[1];
  }
};

template <class T, bool kMoved>
inline PowerSums power_sums(const typename T::Storage* x, int64_t n, float scale, float pivot) {
  using V = typename T::Vector;
  PowerReader<T, kMoved> reader{V{} + scale, V{} + pivot};
  constexpr int kTile = PowerReader<T, kMoved>::kTile;
  DoubleLanes d1 = {}, d2 = {}, d3 = {}, d4 = {}, abs = {};
  for (int64_t i = 0; i < n; i += kTile) {
    prefetch_half(x, n, 1, i, kTile);
    const LanePowers<T> sums = reader.tile(x + i, n - i);
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
  constexpr int kTries = 4, kMostDigits = 25;
  // |x| scale < 1. If d is not 0 for all elements, it is at least 2^-25 for one, so that underflow
  // does not matter. The same is true of d = x if the largest is between 2^-25 and 2^26.
  const double unscale = from_bits(static_cast<uint64_t>(1023 + exponent - kBias + 1) << 52);
  const auto scale = static_cast<float>(1 / unscale);
  bool moved = mean != 0 || exponent < kBias - kMostDigits || exponent > kBias + kMostDigits;
  auto pivot = static_cast<float>(mean / unscale);
  if (!(pivot > -1 && pivot < 1)) pivot = 0;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const PowerSums s =
        moved ? power_sums<T, true>(x, n, scale, pivot) : power_sums<T, false>(x, n, 1, 0);
    const double shift = s.d1 / static_cast<double>(n);
    if (s.d1 * shift <= s.d2 * kLargestShiftShare) {
      const double unit = moved ? unscale : 1, square = unit * unit;
      out = centered(s, n, pivot);
      out.mean *= unit;
      out.m2 *= square;
      out.m3 *= square * unit;
      out.m4 *= square * square;
      return true;
    }
    pivot = static_cast<float>(moved ? pivot + shift : shift / unscale);
    moved = true;
  }
  return false;
}

template <class T>
inline void part_extremes(const typename T::Storage* x, int64_t n, Moments& out) {
  typename T::Vector min = typename T::Vector{} + kInfinity, max = -min;
  for (int64_t i = 0; i < n; i += T::kVectors * T::kWidth) {
    typename T::Vector v[T::kVectors];
    T::load(x + i, v);
    for (int k = 0; k < T::kVectors; ++k) {
      min = smaller(v[k], min);
      max = larger(v[k], max);
    }
  }
  out.min = lanes_min(min);
  out.max = lanes_max(max);
}

// ---- parts and chunks --------------------------------------------------------------------------

// Reads a part of which n is a multiple of kStep. Returns false if the lanes cannot represent it.
template <class T>
inline bool read_part(const typename T::Storage* x, int64_t n, MxLanes& mx, double& mean,
                      PartBytes& bytes, Moments& all, ChunkDistribution& out) {
  MxLanes lanes = mx;
  PartKeys keys;
  read_keys(x, n, lanes, keys, bytes);
  const int top = keys.largest >> 7, bottom = keys.smallest >> 7;
  HigherMoments moments;
  Moments state;
  state.count = state.zeros = moments.n = n;
  state.min = state.max = 0;
  if (keys.largest != 0) {
    if (top > kLargestExponent || bottom < kFlushedDigits[0]) return false;
    const double beyond = from_bits(static_cast<uint32_t>(keys.largest + 1) << 16);
    if (beyond <= all.max && -beyond >= all.min) {  // the part cannot change them
      state.min = all.min;
      state.max = all.max;
    } else {
      part_extremes<T>(x, n, state);
    }
    if (state.min == state.max) {
      moments = {n, state.min, 0, 0, 0, __builtin_fabs(state.min)};
    } else if (!part_moments<T>(x, n, top, mean, moments)) {
      return false;
    }
    if (keys.smallest <= keys.largest - (kFlushedDigits[1] - 1) * 128) {
      count_small(x, n, keys, lanes);
    }
    PartCounts counts(out.counts);
    count_exponents(bytes, n, top, bottom, counts);
    state.zeros -= counts.all;
    state.mean = moments.mean;
    state.m2 = moments.m2;
  }
  mx = lanes;
  // The pivot of the next part: 0 if that is close to the mean.
  mean = 256 * static_cast<double>(n) * state.mean * state.mean > state.m2 ? state.mean : 0;
  out.moments = merge(out.moments, moments);
  all = merge(all, state);
  return true;
}

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// kState: the kernel of the states of integers, which are exact.
template <class T, ChunkKernel kState = nullptr>
Moments distribution(const void* data, int64_t n, ChunkDistribution& out) {
  const auto* x = static_cast<const typename T::Storage*>(data);
  using Storage = typename T::Storage;
  constexpr bool kWide64 = sizeof(Storage) == 8 && !Values<T>::kWhole;
  MxLanes mx;
  Moments state;
  double mean = 0;
  PartBytes bytes;
  for (int64_t i = 0; i < n;) {
    int64_t size = n - i < kPart ? n - i : kPart;
    bool done = false;
    if constexpr (sizeof(Storage) <= (Values<T>::kWhole ? 2 : 4)) {
      const int64_t steps = size / kStep * kStep;
      if (steps > 0) {
        if constexpr (sizeof(Storage) == 4 || kIsBFloat16<T>) {
          done = read_part<T>(x + i, steps, mx, mean, bytes, state, out);
        } else {
          auto* const floats = reinterpret_cast<float*>(scratch());
          Values<T>::of(x + i, steps, floats);
          done = read_part<Native<float, InFloat>>(floats, steps, mx, mean, bytes, state, out);
        }
        if (done) size = steps;
      }
    }
    if (!done) {
      Values<T>::of(x + i, size, scratch());
      read_values(scratch(), size, kWide64 ? kWide : kNarrow, state, out);
    }
    i += size;
  }
  for (int f = 0; f < kMxFormats; ++f) {
    out.mx[f].underflow += lanes_sum(mx.flushed[f]);
    out.mx[f].overflow += lanes_sum(mx.saturated[f]);
  }
  if constexpr (Values<T>::kWhole) return kState(data, n);
  return state;
}
