// Finds the functions of CUDA's driver library.
#include "driver.h"

#include <dlfcn.h>

namespace paramstats::cuda {

Driver driver;

std::string open_driver(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  Driver found;
#define PARAMSTATS_FIND(name, arguments)                                      \
  found.name = reinterpret_cast<decltype(found.name)>(dlsym(library, #name)); \
  if (found.name == nullptr) {                                                \
    return std::string(path) + " has no " #name ": install a newer driver";   \
  }
  PARAMSTATS_DRIVER(PARAMSTATS_FIND)
#undef PARAMSTATS_FIND
  driver = found;
  return "";
}

std::string text_of(const char* function, Result result) {
  if (result == kSuccess) return "";
  const char *name = nullptr, *text = nullptr;
  const std::string where = std::string(function) + ": ";
  if (driver.cuGetErrorName(result, &name) != kSuccess ||
      driver.cuGetErrorString(result, &text) != kSuccess) {  // an error of a newer driver
    return where + "CUDA error " + std::to_string(result);
  }
  return where + name + ": " + text;
}

}  // namespace paramstats::cuda
