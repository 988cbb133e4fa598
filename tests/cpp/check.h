// Checks for the C++ tests, which run where there is no torch, no Python and no test framework.
//
//     void halves() { CHECK(1 + 1, 2); }
//     int main() {
//       RUN(halves);
//       return check::report("cpp example: arithmetic");
//     }
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <limits>
#include <string>

namespace check {

constexpr int kShown = 5;  // failures that a test prints; a broken kernel would print a million

struct Tally {
  int passed = 0, failed = 0;  // tests
  int64_t wrong = 0;           // checks of the running test
  std::string where;           // what the running test is at
};
inline Tally tally;

// Says what the checks that follow are about, for the case that one fails.
inline void at(const std::string& where) { tally.where = where; }

template <class A, class B>
void failure(const char* file, int line, const char* text, const A& got, const B& want) {
  if (++tally.wrong > kShown) return;
  std::cout.precision(std::numeric_limits<long double>::max_digits10);
  std::cout << file << ":" << line << ": " << text << " is " << got << ", expected " << want << " ("
            << tally.where << ")\n";
}

template <class A, class B>
bool same(const A& a, const B& b) {
  return a == b || (a != a && b != b);  // a NaN that is expected is equal
}

template <class A, class B>
bool near(const A& a, const B& b, long double tolerance) {
  using std::fabs;
  return same(a, b) || fabs(static_cast<long double>(a) - b) <= tolerance;
}

inline void run(const char* name, void (*test)()) {
  tally.wrong = 0;
  tally.where = "";
  test();
  if (tally.wrong == 0) {
    ++tally.passed;
    return;
  }
  ++tally.failed;
  std::cout << "FAILED " << name << ": " << tally.wrong << " wrong\n";
}

// What main returns.
inline int report(const std::string& title) {
  std::cout << title << "\n" << tally.passed << " passed, " << tally.failed << " failed\n";
  return tally.failed == 0 ? 0 : 1;
}

}  // namespace check

// Equal: numbers as ==, NaN to NaN.
#define CHECK(got, want)                                                                  \
  do {                                                                                    \
    const auto& got_ = (got);                                                             \
    const auto& want_ = (want);                                                           \
    if (!check::same(got_, want_)) check::failure(__FILE__, __LINE__, #got, got_, want_); \
  } while (0)

// Equal, or apart by `tolerance` (absolute) at most.
#define CHECK_NEAR(got, want, tolerance)                     \
  do {                                                       \
    const auto& got_ = (got);                                \
    const auto& want_ = (want);                              \
    if (!check::near(got_, want_, tolerance)) {              \
      check::failure(__FILE__, __LINE__, #got, got_, want_); \
    }                                                        \
  } while (0)

#define RUN(test) check::run(#test, test)
