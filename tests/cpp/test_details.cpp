// Tests of the details of tensors (csrc/details.h) by the CPU backend: rows, zero rows, and how the
// distributions of chunks are merged. test_distribution.cpp tests the kernels of distributions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/details.h"
#include "cases.h"

namespace paramstats::test {
namespace {

using cpu::available_kernels;
using cpu::kChunk;
using cpu::Kernels;

// Runs every third task on each of three threads, the last tasks first.
void three_threads(int64_t n, cpu::Task task, void* context) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([=] {
      for (int64_t i = n - 1 - t; i >= 0; i -= 3) task(i, context);
    });
  }
  for (auto& thread : threads) thread.join();
}

struct Found {
  Moments state;
  cpu::Details details;
  std::vector<RowState> rows;
  std::vector<bool> zero_rows;  // empty if there is none
};

Found read(const Tensor& t, const Kernels& kernels, bool distribution, bool rows,
           cpu::Pool pool = nullptr) {
  Found found;
  cpu::TensorView view = t.view();
  found.details.has_distribution = distribution;
  RowState unwritten;
  unwritten.zeros = -7;
  found.rows.assign(rows ? view.rows : 0, unwritten);
  if (rows) found.details.rows = found.rows.data();
  if (distribution || rows) view.details = &found.details;
  cpu::ZeroRows zero_rows;
  cpu::summarize({view}, {&found.state}, kernels, pool, {}, &zero_rows);
  for (const auto& [position, bits] : zero_rows) {
    CHECK(position, size_t{0});
    CHECK(static_cast<int64_t>(bits.size()), (view.rows + 7) / 8);
    for (int64_t r = 0; r < view.rows; ++r) found.zero_rows.push_back(bits[r / 8] >> r % 8 & 1);
  }
  return found;
}

bool same_bits(const std::vector<RowState>& a, const std::vector<RowState>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(RowState)) == 0;
}

// ---- rows -----------------------------------------------------------------------------------

void check_row(const RowState& got, const std::vector<double>& values) {
  const oracle::Truth want = oracle::truth_of(values);
  CHECK(got.zeros, want.exact.zeros);
  CHECK(got.nonfinite, want.exact.count - finite_count(want.exact));
  if (want.n == 0) {
    CHECK(got.mean, 0);
    CHECK(got.m2, 0);
    CHECK(got.abs_max, 0);
    return;
  }
  CHECK(got.abs_max, std::fmax(-want.exact.min, want.exact.max));
  const long double rms = sqrtl(want.sum_sq / want.n);
  const long double norm = sqrtl(got.m2 + want.n * static_cast<long double>(got.mean) * got.mean);
  CHECK_NEAR(got.mean, want.mean, 1e-6 * rms);
  if (rms < 1e150) {  // no square overflows
    CHECK_NEAR(sqrtl(got.m2 / want.n), sqrtl(want.m2 / want.n), 1e-6 * rms);
    CHECK_NEAR(norm, sqrtl(want.sum_sq), 1e-6 * sqrtl(want.sum_sq));
  }
  if (want.exact.min == want.exact.max) {
    CHECK(got.mean, want.exact.mean);
    CHECK(got.m2, 0);
  }
}

void check_rows(const std::string& what, const Tensor& t, const oracle::Bounds* looser = nullptr) {
  const std::vector<double> values = t.values();
  const int64_t rows = t.sizes[0], n = t.numel() / rows;
  const oracle::Truth truth = oracle::truth_of(values);
  for (const Kernels* kernels : available_kernels()) {
    const std::string where = std::string(kernels->name) + " " + what + " " + name_of(t.dtype) +
                              " " + std::to_string(rows) + "x" + std::to_string(n);
    const Found found = read(t, *kernels, false, true);
    for (int64_t r = 0; r < rows; ++r) {
      check::at(where + " row " + std::to_string(r));
      const auto begin = values.begin() + r * n;
      check_row(found.rows[r], std::vector<double>(begin, begin + n));
    }
    check::at(where);
    oracle::check_state(found.state, truth, looser ? *looser : bounds(t.dtype));
    const Found again = read(t, *kernels, false, true, three_threads);
    CHECK(same_bits(found.rows, again.rows), true);
    CHECK(oracle::same_bits(found.state, again.state), true);
  }
}

// Row lengths at which the kernels change from one path to another, and at which rows begin and end
// in any place of chunks.
void rows_of_all_dtypes_and_lengths() {
  for (DType dtype : all_dtypes()) {
    const int64_t piece = cpu::row_piece(dtype);
    for (int64_t n :
         {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{64}, int64_t{65}, int64_t{100}, int64_t{129},
          int64_t{1000}, int64_t{1024}, piece - 1, piece, piece + 1, 2 * piece, 3 * piece + 17}) {
      check_rows("lengths", Tensor(dtype, {kChunk / n / 4 + 3, n}, {n, 1}, 1));
    }
    check_rows("borders", Tensor(dtype, {5, kChunk / 2 + 77}, {kChunk / 2 + 77, 1}));
  }
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kInt8}) {
    for (int64_t n : {int64_t{1}, int64_t{96}, int64_t{1023}, kChunk - 1, kChunk, kChunk + 1}) {
      check_rows("chunks", Tensor(dtype, {2 * kChunk / n + 3, n}, {n, 1}));
    }
    check_rows("one row", Tensor(dtype, {1, 3 * kChunk + 5}, {3 * kChunk + 5, 1}));
    check_rows("one dimension", Tensor(dtype, 3000));
  }
}

const struct {
  const char* name;
  Shape sizes, strides;
} kLayouts[] = {
    {"transposed", {300, 700}, {1, 300}},
    {"channels last", {40, 3, 20, 20}, {1200, 1, 60, 3}},
    {"middle dimension first", {30, 40, 50}, {50, 1500, 1}},
    {"every second column", {200, 600}, {1201, 2}},
    {"transposed with gaps", {150, 900}, {2, 301}},
    {"expanded rows", {100, 700}, {0, 1}},
    {"expanded columns", {100, 700}, {1, 0}},
    {"ones", {1, 1, 700, 1}, {5, 5, 1, 3}},
    {"one column with a stride", {3000, 1}, {7, 1}},
    {"rows of one piece with gaps", {3, 10000}, {10001, 1}},
};

void rows_of_all_layouts() {
  for (const auto& [name, sizes, strides] : kLayouts) {
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kUInt8}) {
      check_rows(name, Tensor(dtype, sizes, strides, 1));
    }
  }
}

void rows_of_difficult_values() {
  for (const auto& [name, value_at] : kDifficultValues) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      for (int64_t n : {64, 70, 1024, 5003}) {
        Tensor t = tensor_of(dtype, kCaseSize / n * n, value_at);
        t.sizes = {kCaseSize / n, n};
        t.strides = {n, 1};
        check_rows(name, t, &oracle::kFloatLanes);
      }
    }
  }
}

void nan_and_infinity_at_any_place_of_a_row() {
  for (DType dtype : all_dtypes()) {
    if (!oracle::is_float(dtype)) continue;
    const oracle::FloatFormat f = oracle::float_format(dtype);
    const uint64_t sign = oracle::sign_bit(dtype);
    const uint64_t infinity = (sign - 1) & ~((uint64_t{1} << f.mantissa_bits) - 1);
    for (uint64_t bits : {infinity, sign | infinity, sign - 1, ~uint64_t{0}}) {
      for (int64_t n : {64, 70}) {
        Tensor t(dtype, {2 * n, n}, {n, 1});
        for (int64_t r = 0; r < n; ++r) t.set(2 * r * n + r, bits);
        check_rows("special", t);
      }
    }
  }
}

// Every fourth row has the same elements, wherever it is, and whatever its neighbors contain.
void rows_are_equal_exactly_if_their_elements_are() {
  for (DType dtype : all_dtypes()) {
    for (int64_t n : {8, 33, 64, 1024, 3001, 10000}) {
      const int64_t rows = 2 * kChunk / n + 9, piece = cpu::row_piece(dtype);
      const int64_t other = n > piece ? piece : n - 1;  // the same place in another piece
      for (const Shape& strides : {Shape{n, 1}, Shape{1, rows}}) {
        Tensor t(dtype, {rows, n}, strides);
        std::vector<uint64_t> same(n);
        const uint64_t all_bits = 2 * (oracle::sign_bit(dtype) - 1) + 1;
        for (uint64_t& bits : same) bits = oracle::random_bits(dtype, rng) | 1;
        const uint64_t special = oracle::is_float(dtype) ? oracle::sign_bit(dtype) - 1 : 0;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < n; ++c) {
            const int64_t at = r * strides[0] + c * strides[1];
            if (r % 4 == 0) t.set(at, same[c]);
            if (r % 4 == 1 && c == n / 2) t.set(at, special);                      // NaN
            if (r % 4 == 2) t.set(at, same[c == 0 ? other : c == other ? 0 : c]);  // swapped
            if (r % 4 == 3) t.set(at, same[c] ^ (c == r % n ? 2 : 0));             // one bit
          }
        }
        for (const Kernels* kernels : available_kernels()) {
          check::at(std::string(kernels->name) + " " + name_of(dtype) + " " + std::to_string(n));
          const Found found = read(t, *kernels, false, true);
          const RowState& first = found.rows[0];
          for (int64_t r = 0; r < rows; ++r) {
            const RowState& row = found.rows[r];
            if (r % 4 == 0) CHECK(std::memcmp(&row, &first, sizeof(row)), 0);
            if (r % 4 == 2 && (same[0] ^ same[other]) & all_bits)
              CHECK(row.hash != first.hash, true);
            if (r % 4 == 3 && dtype != DType::kBool) CHECK(row.hash != first.hash, true);
          }
        }
      }
    }
  }
}

// ---- zero rows ------------------------------------------------------------------------------

void check_zero_rows(const std::string& what, const Tensor& t) {
  const std::vector<double> values = t.values();
  const int64_t rows = t.sizes[0], n = t.numel() / rows;
  std::vector<bool> want;
  for (int64_t r = 0; r < rows; ++r) {
    const auto begin = values.begin() + r * n;
    want.push_back(std::all_of(begin, begin + n, [](double x) { return x == 0; }));
  }
  const auto zero_rows = std::count(want.begin(), want.end(), true);
  if (zero_rows == 0 || zero_rows == rows) want.clear();
  for (const Kernels* kernels : available_kernels()) {
    check::at(std::string(kernels->name) + " zero rows " + what + " " + name_of(t.dtype));
    CHECK(read(t, *kernels, false, false).zero_rows == want, true);
    CHECK(read(t, *kernels, false, false, three_threads).zero_rows == want, true);
    CHECK(read(t, *kernels, true, true, three_threads).zero_rows == want, true);
  }
}

void zero_rows_of_all_dtypes_and_layouts() {
  std::vector<std::pair<std::string, std::pair<Shape, Shape>>> shapes = {
      {"wide", {{20, kChunk / 4 + 3}, {kChunk / 4 + 3, 1}}},
      {"many", {{kChunk / 3, 5}, {5, 1}}},
      {"one dimension", {{3001}, {1}}}};
  for (const auto& [name, sizes, strides] : kLayouts) shapes.push_back({name, {sizes, strides}});
  for (const auto& [name, shape] : shapes) {
    const auto& [sizes, strides] = shape;
    for (DType dtype : all_dtypes()) {
      const uint64_t negative = oracle::is_float(dtype) ? oracle::sign_bit(dtype) : 0;
      for (int every : {1, 2, 7}) {
        Tensor t(dtype, sizes, strides, 1);
        if (dtype == DType::kBool) t.fill([](int64_t) { return rng() % 256; });
        const int64_t rows = sizes[0], n = t.numel() / rows;
        for (int64_t r = 0; r < rows; r += every) {
          for (int64_t i = 0; i < n; ++i) {
            int64_t rest = i, at = 1 + r * strides[0];
            for (size_t d = sizes.size(); d-- > 1; rest /= sizes[d]) {
              at += rest % sizes[d] * strides[d];
            }
            const bool is_last = r % (2 * every) != 0 && i == n - 1;  // this row is not all zero
            t.set(at, is_last ? 1 : i % 3 ? negative : 0);
          }
        }
        check_zero_rows(name, t);
      }
    }
  }
}

void tensors_without_enough_zeros_have_no_zero_rows() {
  Tensor dense(DType::kFloat32, {100, 50}, {50, 1});
  dense.fill([](int64_t) { return uint64_t{0x3f800000}; });
  check_zero_rows("no zeros", dense);
  for (int64_t i = 0; i < 60; ++i) dense.set(i * 80, 0);
  check_zero_rows("no zero rows", dense);
  check_zero_rows("one zero", Tensor(DType::kFloat32, {1, 1}, {1, 1}));
  for (const Kernels* kernels : available_kernels()) {
    CHECK(read(Tensor(DType::kFloat32, {0, 5}, {5, 1}), *kernels, true, true).rows.size(), 0u);
    CHECK(read(Tensor(DType::kFloat32, {0}, {1}), *kernels, true, true).state.count, 0);
    Tensor scalar(DType::kFloat32, Shape{}, Shape{});
    scalar.set(0, 0);
    CHECK(read(scalar, *kernels, true, false).zero_rows.size(), 0u);
  }
}

// ---- distributions --------------------------------------------------------------------------

void check_distribution(const Tensor& t) {
  const std::vector<double> values = t.values();
  std::map<int, int64_t> counts[2];  // by exponent: of negative elements, of positive ones
  int64_t n = 0;
  long double sum = 0, sum_abs = 0, m2 = 0, m3 = 0, m4 = 0;
  for (double x : values) {
    if (!std::isfinite(x)) continue;
    ++n;
    sum += x;
    sum_abs += std::fabs(x);
    if (x != 0) ++counts[x > 0][std::ilogb(x)];
  }
  for (double x : values) {
    if (!std::isfinite(x)) continue;
    const long double d = x - sum / n;
    m2 += d * d;
    m3 += d * d * d;
    m4 += d * d * d * d;
  }
  const oracle::Truth truth = oracle::truth_of(values);
  for (const Kernels* kernels : available_kernels()) {
    check::at(std::string(kernels->name) + " distribution " + name_of(t.dtype));
    const Found found = read(t, *kernels, true, false);
    const DistributionHead& head = found.details.head;
    const std::vector<int64_t>& got = found.details.counts;
    CHECK(static_cast<int64_t>(got.size()), 2 * head.bins);
    std::map<int, int64_t> got_counts[2];
    for (int64_t k = 0; k < 2 * head.bins; ++k) {
      const auto exponent = static_cast<int>(head.first + k % head.bins);
      if (got[k] != 0) got_counts[k >= head.bins][exponent] = got[k];
    }
    CHECK(got_counts[0] == counts[0], true);
    CHECK(got_counts[1] == counts[1], true);
    if (head.bins > 0) {
      CHECK(got.front() + got[head.bins] > 0, true);
      CHECK(got[head.bins - 1] + got.back() > 0, true);
    }
    CHECK(head.moments.n, n);
    CHECK_NEAR(head.moments.mean, sum / n, 1e-6 * sqrtl(m2 / n) + 1e-6 * fabsl(sum / n));
    CHECK_NEAR(head.moments.abs_mean, sum_abs / n, 1e-6 * sum_abs / n);
    CHECK_NEAR(head.moments.m2, m2, 1e-5 * m2);
    CHECK_NEAR(head.moments.m4, m4, 1e-5 * m4);
    CHECK_NEAR(head.moments.m3, m3, 1e-5 * sqrtl(m2) * sqrtl(m4));
    const Found again = read(t, *kernels, true, true, three_threads);
    CHECK(std::memcmp(&again.details.head, &head, sizeof(head)), 0);
    CHECK(again.details.counts == got, true);
    const Found plain = read(t, *kernels, false, false);
    oracle::check_counts(found.state, plain.state);
    oracle::check_state(found.state, truth, bounds(t.dtype));
  }
}

void distributions_of_chunks_are_merged() {
  for (DType dtype : all_dtypes()) {
    check_distribution(Tensor(dtype, 2 * kChunk + 77, 1));
    check_distribution(Tensor(dtype, {300, 500}, {1, 300}));
    check_distribution(Tensor(dtype, {300, 500}, {1001, 2}));
  }
}

}  // namespace

// cases.h needs them for tests that do not run here.
std::vector<Result> summarize(const Tensors&) { return {}; }
std::vector<int64_t> boundary_sizes(DType) { return {}; }

}  // namespace paramstats::test

int main() {
  using namespace paramstats::test;
  RUN(rows_of_all_dtypes_and_lengths);
  RUN(rows_of_all_layouts);
  RUN(rows_of_difficult_values);
  RUN(nan_and_infinity_at_any_place_of_a_row);
  RUN(rows_are_equal_exactly_if_their_elements_are);
  RUN(zero_rows_of_all_dtypes_and_layouts);
  RUN(tensors_without_enough_zeros_have_no_zero_rows);
  RUN(distributions_of_chunks_are_merged);
  return check::report("cpp details");
}
