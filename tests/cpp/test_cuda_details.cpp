// Tests of zero rows and distributions by the CUDA kernels. A part of test_cuda_kernels.cpp.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_call.h"
#include "oracle.h"

namespace paramstats::test {
namespace {

using cuda::TensorView;

// What a call reads of each view; "" where there is nothing.
std::vector<cuda::Details> details_of(const Views& views) {
  const Call call(views);
  CHECK(call.error, std::string());
  CHECK(cudaStreamSynchronize(nullptr), cudaSuccess);
  std::vector<cuda::Details> out(views.size());
  for (cuda::Details& found : cuda::details(inputs_of(views, {}), call.host.bytes)) {
    out[found.tensor] = found;
  }
  return out;
}

// ---- zero rows ---------------------------------------------------------------------------------

std::string zero_rows_of(const std::vector<bool>& is_zero) {
  const auto rows = static_cast<int64_t>(is_zero.size());
  std::string bits((rows + 7) / 8, 0);
  bool any = false, all = true;
  for (int64_t r = 0; r < rows; ++r) {
    if (is_zero[r]) bits[r / 8] = static_cast<char>(bits[r / 8] | 1 << r % 8);
    any = any || is_zero[r];
    all = all && is_zero[r];
  }
  if (!any || all) return "";
  return std::string(reinterpret_cast<const char*>(&rows), 8) + bits;
}

// `rows` rows of which `is_zero_row` says whether they are zero. In the others one element is not
// zero, of which the position is random. Zeros have either sign.
template <class IsZero>
void check_zero_rows(DType dtype, int64_t rows, int64_t row_numel, int64_t first, IsZero is_zero) {
  Tensor t(dtype, rows * row_numel, first);
  const bool is_float = oracle::is_float(dtype);
  const uint64_t negative = is_float ? uint64_t{1} << (8 * element_size(dtype) - 1) : 0;
  t.fill([&](int64_t) { return rng() % 2 != 0 ? negative : 0; });
  std::vector<bool> expected;
  for (int64_t r = 0; r < rows; ++r) {
    expected.push_back(is_zero(r));
    if (!is_zero(r)) t.set(first + r * row_numel + static_cast<int64_t>(rng() % row_numel), 1);
  }
  check::at(name_of(dtype) + " " + std::to_string(rows) + " x " + std::to_string(row_numel));
  const cuda::Details found = details_of({view_of_rows(t, rows)})[0];
  CHECK(found.zero_rows == zero_rows_of(expected), true);
  CHECK(found.distribution.empty(), true);
}

void zero_rows_of_all_dtypes_and_lengths() {
  const auto none = [](int64_t) { return false; };
  const auto all = [](int64_t) { return true; };
  const auto third = [](int64_t r) { return r % 3 == 1; };
  for (DType dtype : all_dtypes()) {
    const int64_t chunk = cuda::chunk_size(1, dtype);
    for (int64_t row_numel : {int64_t{1}, int64_t{3}, int64_t{31}, int64_t{32}, int64_t{33},
                              int64_t{1000}, chunk / 4, chunk - 1, chunk, 2 * chunk + 7}) {
      const int64_t rows = 2 * chunk / row_numel + 3;
      check_zero_rows(dtype, rows, row_numel, rng() % 3, third);
    }
    check_zero_rows(dtype, 41, 77, 1, none);
    check_zero_rows(dtype, 41, 77, 1, all);
    check_zero_rows(dtype, 1, 3 * chunk, 0, all);
    check_zero_rows(dtype, 1, 3 * chunk, 0, none);
  }
}

void zero_rows_next_to_nan() {
  Tensor t(DType::kFloat32, 4 * 100);
  t.fill([](int64_t i) { return i / 100 == 2 ? 0u : 0x7fc00000u; });
  CHECK(details_of({view_of_rows(t, 4)})[0].zero_rows == zero_rows_of({0, 0, 1, 0}), true);
}

// Dimension 0 is not the outermost one: a run has one element, or three.
void zero_rows_of_permuted_tensors() {
  for (int64_t inner : {1, 3}) {
    constexpr int64_t kRows = 50, kOuter = 700;
    Tensor t(DType::kFloat32, kRows * kOuter * inner);
    t.fill([=](int64_t i) { return i / inner % kRows % 7 == 2 ? 0u : rng() % 4 == 0; });
    std::vector<bool> expected;
    for (int64_t r = 0; r < kRows; ++r) expected.push_back(r % 7 == 2);
    const TensorView view = {t.data(), t.numel(), t.dtype, 0, kRows, inner};
    CHECK(details_of({view})[0].zero_rows == zero_rows_of(expected), true);
  }
}

void dense_tensors_are_read_once() {
  Tensor t(DType::kFloat32, 4096);
  t.fill([](int64_t i) { return i % 64 == 0 ? 0u : 0x3f800000u + static_cast<uint32_t>(i); });
  const auto loads = [&](const TensorView& view) {
    const int64_t before = cuda_shim::loads;
    details_of({view});
    return cuda_shim::loads - before;
  };
  CHECK(loads(view_of_rows(t, 32)), loads(view_of(t)));         // 64 zeros, rows of 128
  CHECK(loads(view_of_rows(t, 64)) > loads(view_of(t)), true);  // rows of 64
}

void no_launch_is_added_and_memory_is_bounded() {
  const Tensor t(DType::kFloat32, 100);
  const Counts counts;
  details_of({view_of_rows(t, 10)});
  counts.check(1, 0);
  const int64_t n = kMostRows;
  for (int64_t more : {0, 1}) {
    const TensorView view = {t.data(), n + more, DType::kInt8, 0, n + more, 1};
    const cuda::Sizes sizes = cuda::sizes({&view, 1});
    CHECK(sizes.host < 1000 + n / 8 * (1 - more) + n / 1000, true);
    CHECK(sizes.host > n / 8, more == 0);
  }
}

// ---- distributions -----------------------------------------------------------------------------

struct Expected {
  int64_t first = 0, n = 0;
  std::vector<int64_t> negative, positive;
  int64_t mx[2 * kMxFormats] = {};
  long double mean = 0, m2 = 0, m3 = 0, m4 = 0, abs3 = 0, abs_mean = 0;
};

// Of elements, and of their magnitudes, which are exact also where the elements are not.
Expected expected_of(const std::vector<double>& x, const std::vector<long double>& size) {
  Expected out;
  const auto exponent = [](long double v) { return std::ilogb(v); };
  int lowest = 5000, highest = -5000;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i])) continue;
    ++out.n;
    out.mean += x[i];
    out.abs_mean += size[i];
    if (x[i] == 0) continue;
    lowest = std::min(lowest, exponent(size[i]));
    highest = std::max(highest, exponent(size[i]));
  }
  if (out.n > 0) out.mean /= out.n, out.abs_mean /= out.n;
  const int bins = highest < lowest ? 0 : highest - lowest + 1;
  out.first = bins > 0 ? lowest : 0;
  out.negative.resize(bins);
  out.positive.resize(bins);
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i])) continue;
    const long double d = x[i] - out.mean;
    out.m2 += d * d, out.m3 += d * d * d, out.m4 += d * d * d * d, out.abs3 += std::fabs(d * d * d);
    if (x[i] != 0) ++(x[i] < 0 ? out.negative : out.positive)[exponent(size[i]) - lowest];
  }
  for (size_t begin = 0; begin < x.size(); begin += kMxBlock) {
    const size_t end = std::min(begin + kMxBlock, x.size());
    long double largest = 0;
    for (size_t i = begin; i < end; ++i) {
      if (std::isfinite(x[i])) largest = std::max(largest, size[i]);
    }
    if (largest == 0) continue;
    for (int f = 0; f < kMxFormats; ++f) {
      for (size_t i = begin; i < end; ++i) {
        if (!std::isfinite(x[i]) || x[i] == 0) continue;
        const long double y = std::ldexp(size[i], kMxMaxExponent[f] - exponent(largest));
        out.mx[2 * f] += y <= kMxFlushed[f];
        out.mx[2 * f + 1] += f == kMxFloat8E4M3FN ? y > 464 : y >= kMxSaturated[f];
      }
    }
  }
  return out;
}

Expected expected_of(const Tensor& t) {
  const std::vector<double> x = t.values();
  std::vector<long double> size;
  for (size_t i = 0; i < x.size(); ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, t.data() + i * element_size(t.dtype), element_size(t.dtype));
    size.push_back(t.dtype == DType::kInt64 && x[i] < 0 ? static_cast<long double>(0 - bits)
                   : t.dtype >= DType::kInt64 ? static_cast<long double>(bits)
                                              : std::fabs(static_cast<long double>(x[i])));
  }
  return expected_of(x, size);
}

void check_distribution(const std::string& packed, const Expected& want) {
  DistributionHead head;
  CHECK(packed.size() >= sizeof(head), true);
  if (packed.size() < sizeof(head)) return;
  std::memcpy(&head, packed.data(), sizeof(head));
  CHECK(head.first, want.first);
  CHECK(head.bins, static_cast<int64_t>(want.negative.size()));
  CHECK(packed.size(), sizeof(head) + 16 * head.bins);
  std::vector<int64_t> counts(2 * head.bins), expected = want.negative;
  if (!counts.empty()) {
    std::memcpy(counts.data(), packed.data() + sizeof(head), counts.size() * 8);
  }
  expected.insert(expected.end(), want.positive.begin(), want.positive.end());
  CHECK(counts == expected, true);
  for (int f = 0; f < kMxFormats; ++f) {
    CHECK(head.mx[f].underflow, want.mx[2 * f]);
    CHECK(head.mx[f].overflow, want.mx[2 * f + 1]);
  }
  const HigherMoments& m = head.moments;
  const long double rms = std::sqrt(want.m2 / std::max<int64_t>(want.n, 1));
  CHECK(m.n, want.n);
  CHECK_NEAR(m.mean, want.mean, 1e-12L * rms + 1e-15L * std::fabs(want.mean));
  CHECK_NEAR(m.m2, want.m2, 1e-11L * want.m2);
  CHECK_NEAR(m.m3, want.m3, 1e-11L * want.abs3);
  CHECK_NEAR(m.m4, want.m4, 1e-11L * want.m4);
  CHECK_NEAR(m.abs_mean, want.abs_mean, 1e-12L * want.abs_mean);
}

void distributions_of_all_dtypes() {
  Tensors tensors;
  for (DType dtype : all_dtypes()) {
    const int64_t chunk = cuda::chunk_size(1, dtype);
    for (int64_t n : {int64_t{1}, int64_t{31}, int64_t{32}, int64_t{1003}, chunk, 2 * chunk + 77}) {
      tensors.emplace_back(dtype, n, rng() % 3);
      tensors.emplace_back(dtype, n, rng() % 3);  // with any bits: subnormal, NaN, infinity
      tensors.back().fill([](int64_t) { return rng(); });
    }
    tensors.emplace_back(dtype, 100);
    tensors.back().fill([](int64_t) { return 0; });
  }
  Views views;
  for (const Tensor& t : tensors) {
    views.push_back(view_of(t));
    // Not of floats whose fourth powers overflow: any bits of float64.
    views.back().details = kReadDistribution;
  }
  const std::vector<cuda::Details> found = details_of(views);
  for (size_t i = 0; i < tensors.size(); ++i) {
    Expected want = expected_of(tensors[i]);
    check::at(name_of(tensors[i].dtype) + " " + std::to_string(tensors[i].numel()));
    if (want.m4 > 1e300L) {  // counts and means only
      DistributionHead head;
      std::memcpy(&head, found[i].distribution.data(), sizeof(head));
      want.m2 = head.moments.m2, want.m3 = head.moments.m3, want.m4 = head.moments.m4;
      CHECK(std::isfinite(head.moments.m4), false);
      want.mean = head.moments.mean;
      CHECK(std::isfinite(head.moments.mean), true);
    }
    check_distribution(found[i].distribution, want);
  }
}

void mx_limits() {
  Tensor t(DType::kFloat32, 32 * 6 + 3);
  const float values[] = {1,        0x1p-4f,    0x1.000002p-4f, 0x1p-18f, 0x1.000002p-18f,
                          0x1p-32f, 1.75f,      1.7499999f,     1.8125f,  1.8125001f,
                          1.875f,   1.8749999f, -1.9999f,       0,        NAN,
                          INFINITY, 0x1p-149f};
  t.fill([&](int64_t i) {
    const float x = values[i % 17] * std::ldexp(1.0f, static_cast<int>(i / 32 * 20 - 100));
    return static_cast<uint64_t>(bits_of(x));
  });
  TensorView view = view_of(t);
  view.details = kReadDistribution;
  check_distribution(details_of({view})[0].distribution, expected_of(t));
}

void distributions_of_long_tensors_do_not_depend_on_the_schedule() {
  constexpr int64_t kChunks = 1030;
  Tensor t(DType::kFloat64, kChunks * (cuda::kLargeChunk / 8) + 5);
  uint64_t state = 1;
  t.fill([&](int64_t) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return bits_of(1 + static_cast<double>(state >> 11) * 0x1p-53);
  });
  TensorView view = view_of(t);
  view.details = kReadDistribution;
  const std::string first = details_of({view})[0].distribution;
  check_distribution(first, expected_of(t));
  cuda_shim::set_seed(5);
  CHECK(details_of({view})[0].distribution == first, true);
}

void what_a_distribution_enqueues() {
  const Tensor t(DType::kFloat32, 5000);
  Views views(3, view_of(t));
  views[1].details = kReadDistribution;
  const Counts counts;
  const std::vector<cuda::Details> found = details_of(views);
  counts.check(3, 1);
  CHECK(found[0].distribution.empty(), true);
  CHECK(found[1].distribution.empty(), false);
}

}  // namespace

void run_detail_tests() {
  RUN(zero_rows_of_all_dtypes_and_lengths);
  RUN(zero_rows_next_to_nan);
  RUN(zero_rows_of_permuted_tensors);
  RUN(dense_tensors_are_read_once);
  RUN(no_launch_is_added_and_memory_is_bounded);
  RUN(distributions_of_all_dtypes);
  RUN(mx_limits);
  RUN(distributions_of_long_tensors_do_not_depend_on_the_schedule);
  RUN(what_a_distribution_enqueues);
}

}  // namespace paramstats::test
