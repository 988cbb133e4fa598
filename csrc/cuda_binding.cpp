// The Python module paramstats._cuda: passes the functions of the CUDA backend to
// paramstats._native. It needs the CUDA runtime library, but no torch library.
#include <pybind11/pybind11.h>

#include "cuda/engine.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  using paramstats::cuda::api;
  m.doc() = "The CUDA backend of paramstats. Private: import paramstats instead.";
  m.def("api", [] { return py::capsule(&api(), paramstats::cuda::kApiName); });
}
