// The Python module paramstats._cuda: the functions of the CUDA backend. It needs the CUDA runtime
// library, but no torch library. paramstats/_cuda.pyi documents its functions.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "cuda/engine.h"

namespace py = pybind11;

namespace paramstats::cuda {
namespace {

const TensorView* views_of(const py::bytes& views) {
  return reinterpret_cast<const TensorView*>(PyBytes_AS_STRING(views.ptr()));
}

int64_t count_of(const py::bytes& views) {
  return PyBytes_GET_SIZE(views.ptr()) / static_cast<int64_t>(sizeof(TensorView));
}

std::string text_of(const char* error) { return error == nullptr ? "" : error; }

py::tuple sizes_of(const py::bytes& views) {
  const Sizes found = sizes(views_of(views), count_of(views));
  return py::make_tuple(found.host, found.device);
}

// Releases the GIL: a launch may block on a full queue until other Python code has run.
std::string enqueue_reads(const py::bytes& views, uintptr_t host, uintptr_t device,
                          uintptr_t stream) {
  const py::gil_scoped_release release;
  return text_of(enqueue(views_of(views), count_of(views), reinterpret_cast<void*>(host),
                         reinterpret_cast<void*>(device), reinterpret_cast<void*>(stream)));
}

// Copies states to their rows of a table. `rows` has an int64 per state.
void write_rows(const py::bytearray& table, const py::bytes& rows, uintptr_t host) {
  const auto* states = reinterpret_cast<const Moments*>(host);
  const auto* to = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(rows.ptr()));
  auto* out = reinterpret_cast<Moments*>(PyByteArray_AS_STRING(table.ptr()));
  const auto n = PyByteArray_GET_SIZE(table.ptr()) / static_cast<int64_t>(sizeof(Moments));
  const auto states_count = PyBytes_GET_SIZE(rows.ptr()) / static_cast<int64_t>(sizeof(int64_t));
  for (int64_t i = 0; i < states_count; ++i) {
    if (to[i] < 0 || to[i] >= n) {
      throw py::index_error("paramstats._cuda.write_rows: expected a row of a table of " +
                            std::to_string(n) + " rows, got " + std::to_string(to[i]));
    }
    std::memcpy(out + to[i], states + i, sizeof(Moments));
  }
}

}  // namespace
}  // namespace paramstats::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace pybind11::literals;  // NOLINT: needed for the literal _a
  using namespace paramstats::cuda;    // NOLINT: the functions of one namespace
  m.doc() = "The CUDA backend of paramstats. Private: import paramstats instead.";
  m.attr("VIEW_BYTES") = sizeof(TensorView);
  m.attr("RELAXED_CAPTURE") = kRelaxedCapture;
  m.def("check", [] { return text_of(check()); });
  m.def("sizes", &sizes_of, "views"_a);
  m.def("enqueue", &enqueue_reads, "views"_a, "host"_a, "device"_a, "stream"_a);
  m.def("write_rows", &write_rows, "table"_a, "rows"_a, "host"_a);
  m.def("exchange_capture_mode", &exchange_capture_mode, "mode"_a);
}
