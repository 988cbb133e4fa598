// Tests of the state: the laws of merge, update against the oracle, and finalize against
// statistics computed by hand.
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
using oracle::kDoubleLanes;
using oracle::same_bits;
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

Values concatenate(Values a, const Values& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Case {
  const char* name;
  Values x;
};

// Any two of these can be merged within the range of double.
const std::vector<Case>& cases() {
  static const std::vector<Case> kCases = {
      {"empty", {}},
      {"one", {2.5}},
      {"minus zero", {-0.0}},
      {"zeros of both signs", {0.0, -0.0, 0.0}},
      {"0.1 three times", {0.1, 0.1, 0.1}},
      {"3 -4 0", {3, -4, 0}},
      {"1000 constants", Values(1000, 0.1)},
      {"normal", normal(1000, 0, 1)},
      {"nine normal", normal(9, -2, 1)},
      {"mean far above std", normal(1000, 1000, 0.02)},
      {"1 + 1e-4 noise", normal(1024, 1, 1e-4)},
      {"1e30", normal(100, 1e30, 1e28)},
      {"1e-30", normal(100, 0, 1e-30)},
      {"one 1e6 among 1e-6", concatenate(Values(500, 1e-6), {1e6})},
      {"a NaN", {1, kNaN, 3}},
      {"a +inf", {kInf, 1, 3}},
      {"a -inf", {1, 3, -kInf}},
      {"NaN and both infinities", {kInf, 0, kNaN, 5, -kInf, -2, kNaN, 0, 1}},
      {"NaN and a constant", concatenate(Values(20, 0.1), {kNaN})},
      {"all NaN", Values(10, kNaN)},
      {"all +inf", Values(10, kInf)},
      {"all -inf", Values(10, -kInf)},
      {"both infinities alone", {kInf, -kInf}},
  };
  return kCases;
}

// ---- merge ---------------------------------------------------------------------------------

void an_empty_state_is_the_identity_of_merge() {
  std::vector<Moments> states = {{9, 2, 1, 1, 2, -0.25, 3.5, -2, 0.5}};
  for (const Case& c : cases()) states.push_back(state_of(c.x));
  for (const Moments& state : states) {
    CHECK(same_bits(merge(Moments(), state), state), true);
    CHECK(same_bits(merge(state, Moments()), state), true);
  }
}

void merging_two_parts_gives_the_state_of_the_whole_in_either_order() {
  for (const Case& a : cases()) {
    for (const Case& b : cases()) {
      check::at(std::string(a.name) + " with " + b.name);
      const Moments ab = merge(state_of(a.x), state_of(b.x));
      const Moments ba = merge(state_of(b.x), state_of(a.x));
      check_state(ab, truth_of(concatenate(a.x, b.x)), kDoubleLanes);
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

void constants_have_no_rounding() {
  for (double value : {0.1, -1.0 / 3, 1e30, 1e-310, 1.7e308, 0.0, kTiny, DBL_MAX, -DBL_MAX}) {
    check::at("constant " + std::to_string(value));
    Moments merged;
    for (int64_t n : {1, 3, 1024, 7, 1000, 31}) {
      const Moments part = state_of(concatenate(Values(n, value), {kNaN}));
      merged = merge(merged, part);
      for (const Moments& state : {part, merged}) {
        CHECK(state.mean, value);
        CHECK(state.m2, 0);
      }
    }
  }
}

// The difference of the means overflows, the merged mean must not.
void means_at_both_ends_of_double() {
  const Moments low = state_of({-1.7e308}), high = state_of(Values(3, 1.7e308));
  for (const Moments& both : {merge(low, high), merge(high, low)}) {
    CHECK_NEAR(both.mean, 0.85e308, 1e293);
    CHECK(both.m2, kInf);
    CHECK(finalize(both, 1).norm, kInf);
  }
}

void merging_with_an_unread_state_is_unread() {
  CHECK(is_unread(Moments()), false);
  CHECK(is_unread(unread(5)), true);
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

void update_agrees_with_the_oracle() {
  for (const Case& c : cases()) {
    check::at(c.name);
    check_state(state_of(c.x), truth_of(c.x), kDoubleLanes);
    // In two blocks, with an empty one between them.
    const int64_t n = static_cast<int64_t>(c.x.size()), third = n / 3;
    Moments state;
    update(state, c.x.data(), third);
    update(state, c.x.data() + third, 0);
    update(state, c.x.data() + third, n - third);
    check_state(state, truth_of(c.x), kDoubleLanes);
    Moments one_by_one;
    for (double x : c.x) update(one_by_one, x);
    check_state(one_by_one, truth_of(c.x), {1e-12, 1e-12, 1e-12});
  }
}

// Sums and squares overflow. Mean, min and max are in range, and m2 is infinite.
void update_near_the_largest_double() {
  const std::vector<Case> kLarge = {
      {"sum overflows", {1e308, 0.9e308, 1.1e308, 1e308}},
      {"both signs", {1.7e308, -1.7e308, -1.7e308, 1.7e308, 1.7e308, -1.7e308, 1e308, -1e308, 5}},
      {"lanes to +inf and -inf", concatenate(Values(16, 1.7e308), Values(16, -1.7e308))},
      {"with NaN and infinities", {1.7e308, kNaN, 1.6e308, kInf, -kInf}},
      {"mean and element far apart", {1.7e308, -1.7e308, -1.7e308, -1.7e308}},
  };
  for (const Case& c : kLarge) {
    check::at(c.name);
    const Moments state = state_of(c.x);
    const auto want = truth_of(c.x);
    check_counts(state, want.exact);
    CHECK_NEAR(state.mean, want.mean, 1e-13 * 1.7e308);
    CHECK(state.m2, kInf);
  }
  for (int64_t n = 2; n < 100; ++n) {
    check::at(std::to_string(n) + " elements: the mean must not be rounded to infinity");
    Values x(n, DBL_MAX);
    x[0] = std::nextafter(DBL_MAX, 0);
    const Moments state = state_of(x);
    CHECK(state.min <= state.mean && state.mean <= state.max, true);
  }
}

void subnormals_are_not_zeros() {
  const Moments state = state_of({kTiny, -3 * kTiny, 0, 5 * kTiny, 1e-310});
  CHECK(state.zeros, 1);
  CHECK(state.min, -3 * kTiny);
  CHECK(state.max, 1e-310);
  CHECK_NEAR(state.mean, 1e-310 / 5, 2 * kTiny);  // rounded to a multiple of kTiny
  CHECK(state.m2, 0);                             // the squares underflow
}

// ---- finalize ------------------------------------------------------------------------------

void check_statistics(const Statistics& got, const Statistics& want) {
  const double *g = &got.count, *w = &want.count;
  for (int i = 0; i < kStatistics; ++i) CHECK_NEAR(g[i], w[i], 4e-16 * std::fabs(w[i]));
}

void statistics_by_hand() {
  const double var = 37.0 / 3;  // m2 = 3^2 + 4^2 - 3 (1/3)^2 = 74/3, over 3 - 1
  const double std = std::sqrt(var), rms = 5 / std::sqrt(3.0);
  const struct {
    const char* name;
    Moments state;
    Statistics want;
  } kTable[] = {
      {"3 -4 0",
       state_of({3, -4, 0}),
       {3, -1.0 / 3, std, var, 5, rms, -4, 3, 4, 1, 1.0 / 3, 0, 0, 0, 0}},
      {"empty", Moments(), {0, kNaN, kNaN, kNaN, 0, kNaN, kNaN, kNaN, kNaN, 0, kNaN, 0, 0, 0, 0}},
      {"unread",
       unread(12),
       {12, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, 0, kNaN, 0, 0, 0, 0}},
      {"absent",
       unread(kAbsent),
       {-1, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, 0, kNaN, 0, 0, 0, 0}},
  };
  for (const auto& [name, state, want] : kTable) {
    check::at(name);
    check_statistics(finalize(state, 1), want);
    check_statistics(finalize_finite(state, 1), want);
  }
}

void nan_and_infinities_propagate_as_in_torch() {
  struct Row {
    Values x;
    double mean, norm, min, max, abs_max, zero_fraction, nans, pos_infs, neg_infs;
    Values finite;
  };
  const std::vector<Row> kTable = {
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
  for (const Row& r : kTable) {
    check::at("row " + std::to_string(&r - kTable.data()));
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
    const char* reason;
  };
  const std::vector<Row> kTable = {
      {{1, 3}, 0, 1, "m2 / n"},
      {{1, 3}, 0.5, 4.0 / 3, "2 / 1.5"},
      {{1, 3}, 1, 2, "2 / 1"},
      {{1, 3}, 2, kInf, "2 / 0"},
      {{1, 3}, 5, kInf, "a correction above n counts as n"},
      {{1, 3, 5}, -1, 2, "8 / 4"},
      {{7}, 0, 0, "0 / 1"},
      {{7}, 1, kNaN, "0 / 0"},
      {{7, 7}, 9, kNaN, "0 / 0 again"},
      {{}, -1, kNaN, "an empty tensor has no variance"},
      {{1, 3, kNaN}, 0, kNaN, "a NaN"},
  };
  for (const Row& r : kTable) {
    check::at(r.reason);
    const Statistics got = finalize(state_of(r.x), r.correction);
    CHECK_NEAR(got.var, r.var, 4e-16 * r.var);
    CHECK_NEAR(got.std, std::sqrt(r.var), 4e-16 * std::sqrt(r.var));
  }
}

// The squares of these means overflow or underflow, the norms do not.
void norms_near_the_limits_of_double() {
  CHECK_NEAR(finalize(state_of({1e308, 1e308}), 1).norm, std::sqrt(2.0) * 1e308, 1e293);
  CHECK_NEAR(finalize(state_of(Values(4, 1e-300)), 1).norm, 2e-300, 1e-315);
  CHECK(finalize(state_of(Values(4, kTiny)), 1).norm, 2 * kTiny);
}

void statistics_are_divided_by_the_scale() {
  for (double scale : {1.0, 65536.0, 1e3, 1.0 / 7}) {
    for (const Case& c : cases()) {
      check::at(std::string(c.name) + " over " + std::to_string(scale));
      Values x = c.x;
      for (double& v : x) v /= scale;
      const Statistics got = finalize_finite(state_of(c.x), 1, scale);
      const Statistics want = finalize_finite(state_of(x), 1);
      // Rounding each quotient moves the elements by u |x|, and std by as much.
      CHECK_NEAR(got.mean, want.mean, 1e-13 * want.rms);
      CHECK_NEAR(got.std, want.std, 1e-13 * want.std + 2.3e-16 * want.norm);
      CHECK_NEAR(got.norm, want.norm, 1e-13 * want.norm);
      CHECK(got.min, want.min);
      CHECK(got.max, want.max);
    }
  }
}

// The squares of the scale overflow or underflow, the statistics do not.
void scales_near_the_limits_of_double() {
  const Statistics one = finalize(state_of({3, -4, 0}), 1);
  for (double scale : {1e-300, 1e-160, 1e155, 1e300}) {
    check::at(std::to_string(scale));
    const Statistics got = finalize(state_of({3, -4, 0}), 1, scale);
    CHECK_NEAR(got.std, one.std / scale, 4e-16 * one.std / scale);
    CHECK_NEAR(got.norm, 5 / scale, 4e-16 * 5 / scale);
  }
  check::at("the root of a quotient that overflows or underflows");
  CHECK_NEAR(finalize({4, 0, 0, 0, 0, 0, 1e-20, -1, 1}, -1e300).std, 1e-160, 1e-175);
  CHECK_NEAR(finalize({4, 0, 0, 0, 0, 0, 1e300, -1, 1}, 4 - 1e-10).std, 1e155, 1e148);
}

}  // namespace
}  // namespace paramstats

int main() {
  using namespace paramstats;
  RUN(an_empty_state_is_the_identity_of_merge);
  RUN(merging_two_parts_gives_the_state_of_the_whole_in_either_order);
  RUN(merge_is_associative);
  RUN(constants_have_no_rounding);
  RUN(means_at_both_ends_of_double);
  RUN(merging_with_an_unread_state_is_unread);
  RUN(update_agrees_with_the_oracle);
  RUN(update_near_the_largest_double);
  RUN(subnormals_are_not_zeros);
  RUN(statistics_by_hand);
  RUN(nan_and_infinities_propagate_as_in_torch);
  RUN(corrections_divide_as_in_torch);
  RUN(norms_near_the_limits_of_double);
  RUN(statistics_are_divided_by_the_scale);
  RUN(scales_near_the_limits_of_double);
  return check::report("cpp moments: the state and its operations");
}
