// The Python module paramstats._native: reads tensors into tables of Moments, and computes
// statistics from tables. paramstats/_native.pyi documents its functions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/crc32.h"
#include "cpu/engine.h"
#include "cuda_group.h"
#include "module_tree.h"
#include "module_walk.h"
#include "read.h"
#include "tables.h"
#include "thread_pool.h"
#include "torch_abi.h"

namespace py = pybind11;

namespace paramstats {
namespace {

void connect(const py::dict& found) {
  torch_abi::connect(found);
  set_module_class(found["module"]);
  set_statistics_class(found["statistics"]);
}

uint32_t crc32(const py::object& data, uint32_t value) {
  Py_buffer bytes;
  if (PyObject_GetBuffer(data.ptr(), &bytes, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  {
    const py::gil_scoped_release release;
    value = cpu::crc32(bytes.buf, static_cast<size_t>(bytes.len), value);
  }
  PyBuffer_Release(&bytes);
  return value;
}

}  // namespace
}  // namespace paramstats

PYBIND11_MODULE(_native, m) {
  using namespace pybind11::literals;  // NOLINT: needed for the literal _a
  m.doc() = "The native backend of paramstats. Private: import paramstats instead.";
  m.attr("SYMBOLS") = paramstats::torch_abi::symbols();
  m.attr("BLOCK") = paramstats::cpu::kBlock;
  m.attr("CHUNK") = paramstats::cpu::kChunk;
  m.attr("INNER") = paramstats::cpu::kInner;
  m.attr("TILES_AT_ZERO") = paramstats::cpu::kTilesAtZero;
  m.attr("MAX_SHIFT_SHARE") = paramstats::cpu::kMaxShiftShare;
  m.attr("SERIAL_BYTES") = paramstats::cpu::kSerialBytes;
  m.def("walk", &paramstats::walk, "module"_a, "buffers"_a, "make_layout"_a);
  m.def("cached_layouts", &paramstats::cached_layouts);
  m.def("set_dtensor_class", &paramstats::set_dtensor_class, "type"_a);
  using paramstats::CudaGroup;
  py::class_<CudaGroup>(m, "CudaGroup")
      .def_property_readonly("device", &CudaGroup::device)
      .def_property_readonly("replaced", &CudaGroup::replaced)
      .def("sizes",
           [](const CudaGroup& group) {
             const auto [host, device] = group.sizes();
             return py::make_tuple(host, device);
           })
      .def("enqueue", &CudaGroup::enqueue, "host"_a, "device_memory"_a, "stream"_a)
      .def("write", &CudaGroup::write, "table"_a, "host"_a)
      .def("details", &CudaGroup::details, "host"_a)
      .def("aliases", &CudaGroup::aliases);
  m.attr("RELAXED_CAPTURE") = paramstats::cuda::kRelaxedCapture;
  m.def(
      "cuda_open",
      [](const std::string& path) { return paramstats::cuda::open_driver(path.c_str()); },
      "path"_a);
  m.def(
      "cuda_load",
      [](int device, const py::bytes& image) {
        const void* data = PyBytes_AS_STRING(image.ptr());
        const py::gil_scoped_release release;
        return paramstats::cuda::load(device, data);
      },
      "device"_a, "image"_a);
  m.def("exchange_capture_mode", &paramstats::cuda::exchange_capture_mode, "mode"_a);
  m.def("connect", &paramstats::connect, "found"_a);
  m.def("metadata", &paramstats::torch_abi::metadata, "tensor"_a);
  m.def("alias", &paramstats::torch_abi::alias, "tensor"_a);
  // First without `details`: pybind11 allocates memory in calls of functions with 7 arguments.
  m.def(
      "read",
      [](const py::list& tensors, bool params, bool grads, uint64_t cuda_devices, bool hold,
         const py::tuple& updates) {
        return paramstats::read(tensors, params, grads, cuda_devices, hold, updates, py::bytes());
      },
      "tensors"_a, "params"_a, "grads"_a, "cuda_devices"_a = 0, "hold"_a = false,
      "updates"_a = py::tuple());
  m.def("read", &paramstats::read, "tensors"_a, "params"_a, "grads"_a, "cuda_devices"_a = 0,
        "hold"_a = false, "updates"_a = py::tuple(), "details"_a = py::bytes());
  m.def("crc32", &paramstats::crc32, "data"_a, "value"_a = 0);
  m.def("merge_rows", &paramstats::merge_rows, "table"_a, "begin"_a, "end"_a);
  m.def("scalars", &paramstats::scalars, "table"_a, "total"_a, "keys"_a, "columns"_a,
        "correction"_a, "grad_scale"_a);
  m.def("statistic", &paramstats::statistic, "table"_a, "index"_a, "column"_a, "correction"_a,
        "scale"_a);
  m.def("finalize_row", &paramstats::finalize_row, "table"_a, "index"_a, "correction"_a, "scale"_a);
  m.def("finalize_table", &paramstats::finalize_table, "table"_a, "correction"_a, "grad_scale"_a);
  m.def("threads", &paramstats::torch_threads);
  m.def("simd_levels", &paramstats::simd_levels);
  m.def("simd_level", &paramstats::simd_level);
  m.def("set_simd_level", &paramstats::set_simd_level, "name"_a);
}
