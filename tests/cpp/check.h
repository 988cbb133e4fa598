// Checks for the C++ tests, which need neither torch nor Python nor a test framework.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <limits>
#include <string>

namespace check {

constexpr int kShown = 5;  // failures printed per test; a broken kernel has a million

struct Tally {
  int passed = 0, failed = 0;  // tests
  int64_t wrong = 0;           // failed checks of the running test
  std::string where;           // the case that the running test checks
};
inline Tally tally;

// Describes the following checks; printed if one fails.
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
  return a == b || (a != a && b != b);  // NaN equals NaN
}

template <class A, class B>
bool near(const A& a, const B& b, long double tolerance) {
  return same(a, b) || std::fabs(static_cast<long double>(a) - b) <= tolerance;
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

// Prints the result and returns the exit code for main.
inline int report(const std::string& title) {
  std::cout << title << "\n" << tally.passed << " passed, " << tally.failed << " failed\n";
  return tally.failed == 0 ? 0 : 1;
}

}  // namespace check

// Checks that two values are equal (==, or both NaN).
#define CHECK(got, want)                                                                  \
  do {                                                                                    \
    const auto& got_ = (got);                                                             \
    const auto& want_ = (want);                                                           \
    if (!check::same(got_, want_)) check::failure(__FILE__, __LINE__, #got, got_, want_); \
  } while (0)

// Checks that two values are equal or differ by at most `tolerance` (absolute).
#define CHECK_NEAR(got, want, tolerance)                     \
  do {                                                       \
    const auto& got_ = (got);                                \
    const auto& want_ = (want);                              \
    if (!check::near(got_, want_, tolerance)) {              \
      check::failure(__FILE__, __LINE__, #got, got_, want_); \
    }                                                        \
  } while (0)

#define RUN(test) check::run(#test, test)
