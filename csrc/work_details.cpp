// Details of the tensors of a call: where they are written, and how Python gets them.
#include <sys/mman.h>

#include <cstring>
#include <string>

#include "details.h"
#include "work.h"

namespace py = pybind11;

namespace paramstats {
namespace {

// Asks for huge pages for new memory that will be written completely. The system clears a page when
// it is first written to, which takes longer for many small ones than the read of a tensor.
void use_huge_pages(char* memory, size_t size) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(memory) + size) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Bytes of the given size. Their memory is not initialized.
py::bytes new_bytes(size_t size) {
  auto bytes = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  if (!bytes) throw py::error_already_set();
  use_huge_pages(PyBytes_AS_STRING(bytes.ptr()), size);
  return bytes;
}

// Bytes that contain a struct and then `size` bytes at `data`.
template <class Head>
py::bytes packed(const Head& head, const void* data, size_t size) {
  py::bytes bytes = new_bytes(sizeof(head) + size);
  char* const to = PyBytes_AS_STRING(bytes.ptr());
  std::memcpy(to, &head, sizeof(head));
  if (size > 0) std::memcpy(to + sizeof(head), data, size);
  return bytes;
}

}  // namespace

cpu::Details* Work::add_details(const cpu::TensorView& view, size_t row, uint8_t flags) {
  if ((flags & (kReadDistribution | kReadRows)) == 0) return nullptr;
  auto added = std::make_unique<PackedDetails>();
  added->row = row;
  added->details.has_distribution = (flags & kReadDistribution) != 0;
  if ((flags & kReadRows) != 0 && view.rows > 0 && view.numel > 0) {
    const RowsHead head = {view.rows, view.numel / view.rows};
    const size_t size = static_cast<size_t>(view.rows) * sizeof(RowState);
    py::bytes bytes = new_bytes(sizeof(head) + size);
    char* const to = PyBytes_AS_STRING(bytes.ptr());
    std::memcpy(to, &head, sizeof(head));
    added->details.rows = reinterpret_cast<RowState*>(to + sizeof(head));
    added->rows = std::move(bytes);
  }
  details.push_back(std::move(added));
  return &details.back()->details;
}

py::object Work::details_for_python(const Moments* table) const {
  // The usual result. It is shared and takes no memory.
  static PyObject* const none = PyDictProxy_New(py::dict().release().ptr());
  if (details.empty() && zero_rows.empty()) return py::reinterpret_borrow<py::object>(none);
  py::dict out;
  for (const auto& packed_details : details) {
    const cpu::Details& d = packed_details->details;
    py::object distribution = py::none();
    if (d.has_distribution) {
      distribution = packed(d.head, d.counts.data(), d.counts.size() * sizeof(int64_t));
    }
    py::object rows = packed_details->rows ? packed_details->rows : py::none();
    if (distribution.is_none() && rows.is_none()) continue;
    out[py::int_(packed_details->row)] = py::make_tuple(distribution, rows, py::none());
  }
  for (const auto& [position, bits] : zero_rows) {
    const py::int_ row(this->out[position] - table);
    py::bytes zeros = bits.empty() ? packed(kNotKnown, nullptr, 0)
                                   : packed(views[position].rows, bits.data(), bits.size());
    if (out.contains(row)) {
      const py::tuple found = out[row];
      out[row] = py::make_tuple(found[0], found[1], zeros);
    } else {
      out[row] = py::make_tuple(py::none(), py::none(), zeros);
    }
  }
  return out;
}

}  // namespace paramstats
