// The state and its verbs: merge's laws, update against two passes in long double, finalize and
// scaled against statistics that a person can check.
//
//     g++ -std=c++17 -O2 tests/cpp/test_moments.cpp -o build/test_moments && build/test_moments
#include <cfloat>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/moments.h"
#include "check.h"
#include "oracle.h"

namespace paramstats {
namespace {

using oracle::check_counts;
using oracle::check_same;
using oracle::check_state;
using oracle::truth_of;
using Values = std::vector<double>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kTiny = DBL_TRUE_MIN;

Moments state_of(const Values& x) {
  Moments state;
  update(state, x.data(), static_cast<int64_t>(x.size()));
  return state;
}

Values normal(int64_t n, double mean, double std) {
  static oracle::Rng rng(oracle::kSeed);
  std::normal_distribution<double> draw(mean, std);
  Values x(n);
  for (double& v : x) v = draw(rng);
  return x;
}

Values joined(Values a, const Values& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Case {
  const char* name;
  Values x;
};

// Any two of these can be merged within double's range.
const std::vector<Case>& cases() {
  static const std::vector<Case> kCases = {
      {"empty", {}},
      {"one", {2.5}},
      {"minus zero", {-0.0}},
      {"zeros of both signs", {0.0, -0.0, 0.0}},
      {"0.1 thrice", {0.1, 0.1, 0.1}},
      {"3 -4 0", {3, -4, 0}},
      {"1000 constants", Values(1000, 0.1)},
      {"normal", normal(1000, 0, 1)},
      {"nine normal", normal(9, -2, 1)},
      {"mean far above std", normal(1000, 1000, 0.02)},
      {"1 + 1e-4 noise", normal(1024, 1, 1e-4)},
      {"1e30", normal(100, 1e30, 1e28)},
      {"1e-30", normal(100, 0, 1e-30)},
      {"one 1e6 among 1e-6", joined(Values(500, 1e-6), {1e6})},
      {"a NaN", {1, kNaN, 3}},
      {"a +inf", {kInf, 1, 3}},
      {"a -inf", {1, 3, -kInf}},
      {"NaN and both infinities", {kInf, 0, kNaN, 5, -kInf, -2, kNaN, 0, 1}},
      {"NaN and a constant", joined(Values(20, 0.1), {kNaN})},
      {"all NaN", Values(10, kNaN)},
      {"all +inf", Values(10, kInf)},
      {"all -inf", Values(10, -kInf)},
      {"both infinities alone", {kInf, -kInf}},
  };
  return kCases;
}

// ---- merge ---------------------------------------------------------------------------------

void empty_is_the_identity_of_merge() {
  for (const Case& c : cases()) {
    check::at(c.name);
    const Moments state = state_of(c.x);
    CHECK(oracle::same_bits(merge(Moments(), state), state), true);
    CHECK(oracle::same_bits(merge(state, Moments()), state), true);
  }
  check::at("a state that no merge has made");
  const Moments literal = {9, 2, 1, 1, 2, -0.25, 3.5, -2, 0.5};
  check_same(merge(Moments(), literal), literal);
  check_same(merge(literal, Moments()), literal);
}

void merge_commutes() {
  for (const Case& a : cases()) {
    for (const Case& b : cases()) {
      check::at(std::string(a.name) + " with " + b.name);
      const Moments ab = merge(state_of(a.x), state_of(b.x));
      const Moments ba = merge(state_of(b.x), state_of(a.x));
      check_counts(ab, ba);
      CHECK_NEAR(ab.mean, ba.mean, 1e-15 * std::fmax(std::fabs(ab.min), std::fabs(ab.max)));
      CHECK_NEAR(ab.m2, ba.m2, 1e-15 * ab.m2);
    }
  }
}

void merge_is_associative() {
  oracle::Rng rng(oracle::kSeed);
  std::uniform_real_distribution<double> mean(-3, 3);
  std::uniform_int_distribution<int64_t> size(0, 500);
  for (int i = 0; i < 200; ++i) {
    check::at("triple " + std::to_string(i));
    const Moments a = state_of(normal(size(rng), mean(rng), 1));
    const Moments b = state_of(normal(size(rng), mean(rng), 1));
    const Moments c = state_of(normal(size(rng), mean(rng), 1));
    const Moments left = merge(merge(a, b), c), right = merge(a, merge(b, c));
    check_counts(left, right);
    CHECK_NEAR(left.mean, right.mean, 1e-12 * finalize(right, 0).rms);
    CHECK_NEAR(left.m2, right.m2, 1e-12 * right.m2);
  }
}

void merged_parts_are_the_state_of_the_whole() {
  for (const Case& a : cases()) {
    for (const Case& b : cases()) {
      check::at(std::string(a.name) + " with " + b.name);
      check_state(merge(state_of(a.x), state_of(b.x)), truth_of(joined(a.x, b.x)),
                  oracle::kDoubleLanes);
    }
  }
}

void parts_of_a_constant_merge_to_it() {
  for (double value : {0.1, -1.0 / 3, 1e30, 1e-310, 1.7e308, 0.0}) {
    check::at("constant " + std::to_string(value));
    Moments all;
    for (int64_t n : {1, 3, 1024, 7, 1000, 31}) {
      all = merge(all, state_of(Values(n, value)));
      CHECK(all.mean, value);
      CHECK(all.m2, 0);
    }
  }
}

// Their difference overflows: the mean must not.
void means_at_both_ends_of_double_merge_to_a_mean_between() {
  const Moments low = state_of({-1.7e308}), high = state_of(Values(3, 1.7e308));
  for (const Moments& both : {merge(low, high), merge(high, low)}) {
    CHECK_NEAR(both.mean, 0.85e308, 1e293);
    CHECK(both.m2, kInf);
    CHECK(finalize(both, 1).norm, kInf);
  }
}

void what_was_not_read_stays_unread() {
  CHECK(is_unread(Moments()), false);
  CHECK(is_unread(unread(5)), true);
  const Moments absent = unread(kAbsent);  // a gradient that is None, not one of no elements
  CHECK(is_unread(absent), true);
  CHECK(absent.count == unread(0).count, false);
  for (const Case& c : cases()) {
    check::at(c.name);
    const auto size = static_cast<int64_t>(c.x.size());
    for (const Moments& m : {merge(unread(5), state_of(c.x)), merge(state_of(c.x), unread(5))}) {
      CHECK(is_unread(m), true);
      CHECK(m.count, size + 5);
    }
  }
}

// ---- update --------------------------------------------------------------------------------

void update_agrees_with_two_long_double_passes() {
  for (const Case& c : cases()) {
    check::at(c.name);
    check_state(state_of(c.x), truth_of(c.x), oracle::kDoubleLanes);
  }
}

void update_takes_in_a_block_after_another() {
  for (const Case& c : cases()) {
    check::at(c.name);
    const int64_t n = static_cast<int64_t>(c.x.size()), third = n / 3;
    Moments state;
    update(state, c.x.data(), third);
    update(state, c.x.data() + third, 0);
    update(state, c.x.data() + third, n - third);
    check_state(state, truth_of(c.x), oracle::kDoubleLanes);
  }
}

void update_of_a_constant_has_no_rounding() {
  for (double value : {0.1, 1e30, kTiny, DBL_MAX, -DBL_MAX}) {
    for (int64_t n : {1, 3, 1000, 1024}) {
      check::at(std::to_string(n) + " times " + std::to_string(value));
      Values x(n, value);
      x.push_back(kNaN);
      const Moments state = state_of(x);
      CHECK(state.mean, value);
      CHECK(state.m2, 0);
    }
  }
}

// Sums and squares overflow; mean, min and max are in range and m2 is as near as double comes.
void update_near_the_largest_double() {
  const std::vector<Case> large = {
      {"sum overflows", {1e308, 0.9e308, 1.1e308, 1e308}},
      {"both signs", {1.7e308, -1.7e308, -1.7e308, 1.7e308, 1.7e308, -1.7e308, 1e308, -1e308, 5}},
      {"lanes to +inf and -inf", joined(Values(16, 1.7e308), Values(16, -1.7e308))},
      {"beside NaN and inf", {1.7e308, kNaN, 1.6e308, kInf, -kInf}},
      {"mean and element far apart", {1.7e308, -1.7e308, -1.7e308, -1.7e308}},
  };
  for (const Case& c : large) {
    check::at(c.name);
    const Moments state = state_of(c.x);
    const auto want = truth_of(c.x);
    check_counts(state, want.exact);
    CHECK_NEAR(state.mean, want.mean, 1e-13 * 1.7e308);
    CHECK(state.m2, kInf);
  }
}

// The shares of the mean must not round up to infinity either.
void the_mean_lies_between_min_and_max() {
  for (int64_t n = 2; n < 100; ++n) {
    check::at(std::to_string(n) + " elements");
    Values x(n, DBL_MAX);
    x[0] = std::nextafter(DBL_MAX, 0);
    const Moments state = state_of(x);
    CHECK(state.min <= state.mean && state.mean <= state.max, true);
  }
}

void subnormals_are_numbers_and_not_zeros() {
  const Moments state = state_of({kTiny, -3 * kTiny, 0, 5 * kTiny, 1e-310});
  CHECK(state.zeros, 1);
  CHECK(state.min, -3 * kTiny);
  CHECK(state.max, 1e-310);
  CHECK_NEAR(state.mean, 1e-310 / 5, 2 * kTiny);  // rounded to the smallest step there is
  CHECK(state.m2, 0);                             // their squares are not representable
}

// ---- finalize ------------------------------------------------------------------------------

void check_statistics(const Statistics& got, const Statistics& want) {
  const double *g = &got.count, *w = &want.count;
  for (int i = 0; i < kStatistics; ++i) CHECK_NEAR(g[i], w[i], 4e-16 * std::fabs(w[i]));
}

void finalize_of_3_minus_4_and_0() {
  const Statistics got = finalize(state_of({3, -4, 0}), 1);
  const double var = 37.0 / 3;  // m2 = 3^2 + 4^2 - 3 (1/3)^2 = 74/3, over 3 - 1
  const double rms = 5 / std::sqrt(3.0);
  check_statistics(got, {3, -1.0 / 3, std::sqrt(var), var, 5, rms, -4, 3, 4, 1, 1.0 / 3, 0, 0, 0, 0});
  check_statistics(finalize_finite(state_of({3, -4, 0}), 1), got);
}

void what_is_empty_has_a_norm_and_no_other_figure() {
  const Statistics want = {0, kNaN, kNaN, kNaN, 0, kNaN, kNaN, kNaN, kNaN, 0, kNaN, 0, 0, 0, 0};
  check_statistics(finalize(Moments(), 1), want);
  check_statistics(finalize_finite(Moments(), 1), want);
}

void what_was_not_read_has_a_count_and_no_figures() {
  for (int64_t n : {int64_t{0}, int64_t{12}, kAbsent}) {
    check::at("count " + std::to_string(n));
    for (const Statistics& f : {finalize(unread(n), 1), finalize_finite(unread(n), 1)}) {
      CHECK(f.count, n);
      for (double statistic :
           {f.mean, f.std, f.var, f.norm, f.rms, f.min, f.max, f.abs_max, f.zero_fraction}) {
        CHECK(statistic, kNaN);
      }
      CHECK(f.nonfinite_count, 0);
    }
  }
}

void nan_and_infinities_spread_as_in_torch() {
  struct Row {
    Values x;
    double mean, norm, min, max, abs_max, zero_fraction, nans, pos_infs, neg_infs;
    Values finite;
  };
  const std::vector<Row> table = {
      {{1, kNaN, 3}, kNaN, kNaN, kNaN, kNaN, kNaN, 0, 1, 0, 0, {1, 3}},
      {{0, kInf, 2}, kInf, kInf, 0, kInf, kInf, 1.0 / 3, 0, 1, 0, {0, 2}},
      {{0, -kInf, 2}, -kInf, kInf, -kInf, 2, kInf, 1.0 / 3, 0, 0, 1, {0, 2}},
      {{0, -kInf, 2, kInf}, kNaN, kInf, -kInf, kInf, kInf, 0.25, 0, 1, 1, {0, 2}},
      {{0, -kInf, kNaN, kInf, 7}, kNaN, kNaN, kNaN, kNaN, kNaN, 0.2, 1, 1, 1, {0, 7}},
      {{kInf, kInf}, kInf, kInf, kInf, kInf, kInf, 0, 0, 2, 0, {}},
      {{-kInf, -kInf}, -kInf, kInf, -kInf, -kInf, kInf, 0, 0, 0, 2, {}},
      {{-kInf, kInf}, kNaN, kInf, -kInf, kInf, kInf, 0, 0, 1, 1, {}},
      {{kNaN}, kNaN, kNaN, kNaN, kNaN, kNaN, 0, 1, 0, 0, {}},
  };
  for (const Row& r : table) {
    check::at("row " + std::to_string(&r - table.data()));
    const double count = static_cast<double>(r.x.size());
    const double zeros = r.zero_fraction * count;
    check_statistics(
        finalize(state_of(r.x), 1),
        {count, r.mean, kNaN, kNaN, r.norm, r.norm, r.min, r.max, r.abs_max, zeros, r.zero_fraction,
         r.nans, r.pos_infs, r.neg_infs, r.nans + r.pos_infs + r.neg_infs});
    check_statistics(finalize_finite(state_of(r.x), 1), finalize(state_of(r.finite), 1));
  }
}

void corrections_divide_as_in_torch() {
  struct Row {
    Values x;
    double correction, var;
    const char* why;
  };
  const std::vector<Row> table = {
      {{1, 3}, 0, 1, "m2 / n"},
      {{1, 3}, 0.5, 4.0 / 3, "2 / 1.5"},
      {{1, 3}, 1, 2, "2 / 1"},
      {{1, 3}, 2, kInf, "2 / 0"},
      {{1, 3}, 5, kInf, "more than n is as n: not 2 / -3"},
      {{1, 3, 5}, -1, 2, "8 / 4"},
      {{7}, 0, 0, "0 / 1"},
      {{7}, 1, kNaN, "0 / 0"},
      {{7, 7}, 9, kNaN, "0 / 0 again"},
      {{}, -1, kNaN, "of nothing there is no variance"},
      {{1, 3, kNaN}, 0, kNaN, "a NaN"},
  };
  for (const Row& r : table) {
    check::at(r.why);
    const Statistics got = finalize(state_of(r.x), r.correction);
    CHECK_NEAR(got.var, r.var, 4e-16 * r.var);
    CHECK_NEAR(got.std, std::sqrt(r.var), 4e-16 * std::sqrt(r.var));
  }
}

// The squares of these means are out of double's range, their norms are not.
void norms_at_the_ends_of_double() {
  CHECK_NEAR(finalize(state_of({1e308, 1e308}), 1).norm, std::sqrt(2.0) * 1e308, 1e293);
  CHECK_NEAR(finalize(state_of(Values(4, 1e-300)), 1).norm, 2e-300, 1e-315);
  CHECK(finalize(state_of(Values(4, kTiny)), 1).norm, 2 * kTiny);
}

// ---- scaled --------------------------------------------------------------------------------

void scaled_is_the_state_of_the_scaled_elements() {
  for (double factor : {1.0, 1.0 / 65536, 1e-3, 7.0}) {
    for (const Case& c : cases()) {
      check::at(std::string(c.name) + " times " + std::to_string(factor));
      Values x = c.x;
      for (double& v : x) v *= factor;
      const Moments got = scaled(state_of(c.x), factor), want = state_of(x);
      check_counts(got, want);
      CHECK_NEAR(got.mean, want.mean, 1e-13 * finalize_finite(want, 0).rms);
      // Rounding each product moves the elements by u |x|, and std by as much.
      const double std = std::sqrt(want.m2), norm = finalize_finite(want, 0).norm;
      CHECK_NEAR(std::sqrt(got.m2), std, 1e-13 * std + 2.3e-16 * norm);
    }
  }
  check_same(scaled(state_of({3, -4, 0}), 0.5), state_of({1.5, -2, 0}));  // exact in powers of 2
  CHECK(is_unread(scaled(unread(3), 0.5)), true);
  CHECK(scaled(unread(3), 0.5).count, 3);
}

int run_all() {
  RUN(empty_is_the_identity_of_merge);
  RUN(merge_commutes);
  RUN(merge_is_associative);
  RUN(merged_parts_are_the_state_of_the_whole);
  RUN(parts_of_a_constant_merge_to_it);
  RUN(means_at_both_ends_of_double_merge_to_a_mean_between);
  RUN(what_was_not_read_stays_unread);
  RUN(update_agrees_with_two_long_double_passes);
  RUN(update_takes_in_a_block_after_another);
  RUN(update_of_a_constant_has_no_rounding);
  RUN(update_near_the_largest_double);
  RUN(the_mean_lies_between_min_and_max);
  RUN(subnormals_are_numbers_and_not_zeros);
  RUN(finalize_of_3_minus_4_and_0);
  RUN(what_is_empty_has_a_norm_and_no_other_figure);
  RUN(what_was_not_read_has_a_count_and_no_figures);
  RUN(nan_and_infinities_spread_as_in_torch);
  RUN(corrections_divide_as_in_torch);
  RUN(norms_at_the_ends_of_double);
  RUN(scaled_is_the_state_of_the_scaled_elements);
  return check::report("cpp moments: the state and its verbs");
}

}  // namespace
}  // namespace paramstats

int main() { return paramstats::run_all(); }
