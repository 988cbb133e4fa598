// Tests that what csrc/older_libraries.cpp defines counts references to exceptions as libstdc++
// does.
//
//     g++ -std=c++17 tests/cpp/test_older_libraries.cpp csrc/older_libraries.cpp -o
//     build/test_older
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace {

struct Counted : std::runtime_error {
  static inline int alive = 0;
  explicit Counted(const char* message) : std::runtime_error(message) { ++alive; }
  Counted(const Counted& other) : std::runtime_error(other) { ++alive; }
  ~Counted() override { --alive; }
};

std::exception_ptr caught() {
  try {
    throw Counted("one");
  } catch (...) {
    return std::current_exception();
  }
}

void an_exception_lives_as_long_as_the_last_reference() {
  std::exception_ptr first = caught();
  std::exception_ptr second = first;
  std::vector<std::exception_ptr> many(10, second);
  first = nullptr;
  second = many[3];
  many.clear();
  CHECK(Counted::alive, 1);
  second = std::as_const(second);
  CHECK(Counted::alive, 1);
  second = nullptr;
  CHECK(Counted::alive, 0);
}

void a_copy_can_be_thrown_again() {
  const std::exception_ptr first = caught();
  for (int i = 0; i < 3; ++i) {
    const std::exception_ptr copy = first;
    std::string message;
    try {
      std::rethrow_exception(copy);
    } catch (const Counted& error) {
      message = error.what();
    }
    CHECK(message, std::string("one"));
    CHECK(Counted::alive, 1);
  }
}

void nested_exceptions_keep_the_inner_one() {
  try {
    try {
      std::rethrow_exception(caught());
    } catch (...) {
      std::throw_with_nested(std::logic_error("outer"));
    }
  } catch (const std::logic_error& error) {
    CHECK(Counted::alive, 1);
    std::string message;
    try {
      std::rethrow_if_nested(error);
    } catch (const Counted& inner) {
      message = inner.what();
    }
    CHECK(message, std::string("one"));
  }
  CHECK(Counted::alive, 0);
}

void sizes_that_overflow_throw() {
  const volatile std::size_t size = ~std::size_t{0} / 4;
  bool thrown = false;
  try {
    std::allocator<double>().deallocate(std::allocator<double>().allocate(size), size);
  } catch (const std::bad_array_new_length&) {
    thrown = true;
  }
  CHECK(thrown, true);
}

}  // namespace

int main() {
  RUN(an_exception_lives_as_long_as_the_last_reference);
  RUN(a_copy_can_be_thrown_again);
  RUN(nested_exceptions_keep_the_inner_one);
  RUN(sizes_that_overflow_throw);
  return check::report("cpp older libraries: references to exceptions");
}
