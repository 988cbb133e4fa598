// Lets a module that a recent compiler built load with older system libraries: glibc 2.28 and the
// libstdc++ of GCC 8, which manylinux_2_28 promises.
//
// The headers of libstdc++ and pybind11 use four symbols of later versions. They are defined here,
// for this module alone, by what the older libraries have. They are weak, because a static
// libstdc++ has them, too. `make wheels` fails if the module needs a later library again.
#include <cxxabi.h>

#include <cstring>
#include <exception>
#include <new>
#include <utility>

#if defined(__linux__) && defined(__GLIBCXX__)

#define DEFINES(symbol) asm(symbol) __attribute__((weak, visibility("hidden")))

extern "C" {

// glibc 2.32: whether the process has a single thread, so that reference counts need not be atomic.
extern char single_threaded DEFINES("__libc_single_threaded");
char single_threaded = 0;

// GCC 11: the allocator's error for sizes that overflow.
[[noreturn]] void throw_bad_length() DEFINES("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_length() { abi::__cxa_throw_bad_array_new_length(); }

// GCC 11: adds to the reference count of an exception. Before, only functions of the library did.
// The exception is thrown, which moves the reference of `self`, and current_exception adds two.
void add_reference(std::exception_ptr* self)
    DEFINES("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(std::exception_ptr* self) {
  try {
    std::rethrow_exception(std::move(*self));
  } catch (...) {
    new (self) std::exception_ptr(std::current_exception());
    alignas(std::exception_ptr) char other[sizeof(std::exception_ptr)];
    new (other) std::exception_ptr(std::current_exception());  // not destroyed: this adds one
  }
}

// GCC 11: subtracts from the reference count of an exception. The destructor of nested_exception,
// a vtable and an exception_ptr, does so in every libstdc++.
void destroy_nested_exception(void*) asm("_ZNSt16nested_exceptionD1Ev");
void release(void* self) DEFINES("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void* self) {
  void* nested[2] = {};
  static_assert(sizeof(nested) == sizeof(std::nested_exception));
  std::memcpy(&nested[1], self, sizeof(void*));
  destroy_nested_exception(nested);
}

}  // extern "C"

#endif
