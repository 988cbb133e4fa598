// The Python module paramstats._cuda: hands the CUDA engine's functions to paramstats._native.
// It needs CUDA's runtime library and nothing of torch.
#include <pybind11/pybind11.h>

#include "cuda/engine.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  using paramstats::cuda::api;
  m.doc() = "The CUDA engine of paramstats. Private: import paramstats instead.";
  m.def("api", [] { return py::capsule(&api(), paramstats::cuda::kApiName); });
}
