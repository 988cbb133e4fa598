// The updates that `read` gets from Python.
#include "update_arguments.h"

#include <string>

namespace py = pybind11;

namespace paramstats {
namespace {

// The positions of the fields of a tuple.
enum Field {
  kParam,
  kGrad,
  kMomentum,
  kVariance,
  kStepRow,
  kOld,
  kMethod,
  kLr,
  kDecay,
  kBeta1,
  kBeta2,
  kEps,
  kStep,
  kFields
};

[[noreturn]] void fail(const std::string& expected) {
  throw py::value_error("paramstats._native.read: expected " + expected);
}

size_t row_at(const py::tuple& fields, Field field, size_t rows) {
  const auto row = fields[field].cast<int64_t>();
  if (row == -1) return kNoRow;
  if (row < 0 || static_cast<size_t>(row) >= rows) {
    fail("rows of an update below " + std::to_string(rows) + " or -1, got " + std::to_string(row));
  }
  return static_cast<size_t>(row);
}

UpdateArguments convert(const py::handle& object, size_t n) {
  if (!py::isinstance<py::tuple>(object) || PyTuple_GET_SIZE(object.ptr()) != kFields) {
    fail("updates that are tuples of " + std::to_string(kFields) + " fields");
  }
  const auto fields = py::reinterpret_borrow<py::tuple>(object);
  const auto number = [&](Field field) { return fields[field].cast<double>(); };
  UpdateArguments out{row_at(fields, kParam, n),
                      row_at(fields, kGrad, 2 * n),
                      row_at(fields, kMomentum, n),
                      row_at(fields, kVariance, n),
                      row_at(fields, kStepRow, n),
                      nullptr,
                      static_cast<UpdateMethod>(fields[kMethod].cast<int32_t>()),
                      {number(kLr), number(kDecay), number(kBeta1), number(kBeta2), number(kEps)},
                      number(kStep)};
  if (out.param == kNoRow) fail("the row of the parameter of an update");
  switch (out.method) {
    case UpdateMethod::kNone: break;
    case UpdateMethod::kFormula:
      if (out.momentum == kNoRow || out.variance == kNoRow) {
        fail("the rows of both moments, because the update is computed by the formula of Adam");
      }
      break;
    case UpdateMethod::kDifference: {
      PyObject* old = py::object(fields[kOld]).ptr();
      if (!torch_abi::is_tensor(old)) fail("a tensor with the elements before the step");
      out.old = torch_abi::impl_of(old);
      break;
    }
    default: fail("a method of an update from 0 to 2");
  }
  return out;
}

}  // namespace

std::vector<UpdateArguments> update_arguments(const py::tuple& updates, size_t n) {
  std::vector<UpdateArguments> out;
  out.reserve(updates.size());
  for (const py::handle update : updates) out.push_back(convert(update, n));
  return out;
}

}  // namespace paramstats
