// Lists the tensors of an nn.Module and caches one layout per model while it is valid.
#include "module_walk.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "lookahead.h"
#include "module_tree.h"
#include "torch_abi.h"

namespace py = pybind11;

namespace paramstats {
namespace {

// In pointers. The memory of a larger tree is not kept for the next call.
constexpr size_t kMaxScratch = 1 << 20;

// The properties of tensors that a layout contains. They are compared without making Python
// objects.
class Metadata {
 public:
  void add(PyObject* object) {
    types_.push_back(Py_TYPE(object));
    const Now now(object);
    fields_.push_back(now);
    sizes_.insert(sizes_.end(), now.sizes, now.sizes + now.dim);
  }

  // Whether object_at(i) has these properties for every i. It may be another object.
  template <class ObjectAt>
  bool describes(const ObjectAt& object_at) const {
    Lookahead lookahead(types_.size(), false, object_at);
    const int64_t* sizes = sizes_.data();
    for (size_t i = 0; i < types_.size(); ++i) {
      lookahead.advance(i);
      PyObject* object = object_at(i);
      // `types_` is borrowed: another class may have the address of one that was deleted.
      if (Py_TYPE(object) != types_[i] || !torch_abi::is_tensor(object)) return false;
      const Now now(object, fields_[i].keys);
      if (!(now == fields_[i])) return false;
      for (int64_t d = 0; d < now.dim; ++d) {
        if (now.sizes[d] != *sizes++) return false;
      }
    }
    return true;
  }

 private:
  struct Fields {
    bool is_known = false, requires_grad = false;  // is_known: torch has reported all the others
    uint64_t keys = 0;
    int32_t dtype = 0, device_type = 0, device_index = 0;  // devices: 0 if the keys say the CPU
    int64_t dim = 0;
    bool operator==(const Fields& other) const {
      return is_known && other.is_known && requires_grad == other.requires_grad &&
             keys == other.keys && dtype == other.dtype && device_type == other.device_type &&
             device_index == other.device_index && dim == other.dim;
    }
  };
  // The fields of a tensor and its sizes, which are borrowed.
  struct Now : Fields {
    int64_t* sizes = nullptr;
    explicit Now(PyObject* object)
        : Now(object,
              torch_abi::keys_of(torch_abi::impl_of(object)) & ~torch_abi::api.autograd_keys) {}
    // Of an object with other keys, only the keys are read.
    Now(PyObject* object, uint64_t expected_keys) {
      using torch_abi::api;
      const torch_abi::Impl t = torch_abi::impl_of(object);
      const AtenTensorHandle h = torch_abi::handle(t);
      keys = torch_abi::keys_of(t) & ~api.autograd_keys;
      if (keys != expected_keys) return;
      requires_grad = api.requires_grad(t);
      AOTITorchError errors = api.aoti_torch_get_dtype(h, &dtype) |
                              api.aoti_torch_get_sizes(h, &sizes) | api.aoti_torch_get_dim(h, &dim);
      if (keys != api.plain_cpu_keys) {
        errors |= api.aoti_torch_get_device_type(h, &device_type) |
                  api.aoti_torch_get_device_index(h, &device_index);
      }
      is_known = errors == AOTI_TORCH_SUCCESS;
      if (!is_known) dim = 0;
    }
  };
  std::vector<PyTypeObject*> types_;
  std::vector<Fields> fields_;
  std::vector<int64_t> sizes_;  // of all tensors
};

// A module class at the time when it did not override how modules list their tensors. The class is
// not owned: it may own a model, which could then never be freed.
struct Class {
  py::object weakref;
  PyTypeObject* type;
  unsigned int version;  // Python's tp_version_tag: changes with the class or one of its bases

  explicit Class(PyTypeObject* t)
      : weakref(py::reinterpret_steal<py::object>(
            PyWeakref_NewRef(reinterpret_cast<PyObject*>(t), nullptr))),
        type(t),
        version(version_of(t)) {
    if (!weakref) PyErr_Clear();
  }

  static unsigned int version_of(PyTypeObject* t) {
#if PY_VERSION_HEX < 0x030b0000  // there, a flag says whether the number is valid
    if (!PyType_HasFeature(t, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    return t->tp_version_tag;
  }

  bool is_unchanged() const {
    // While the class is alive, no other class can have its address.
    if (!weakref) return false;
#if PY_VERSION_HEX < 0x030d0000
    if (PyWeakref_GetObject(weakref.ptr()) == Py_None) return false;
#else
    PyObject* alive = nullptr;
    if (PyWeakref_GetRef(weakref.ptr(), &alive) != 1) return false;
    Py_DECREF(alive);  // not the last reference: an instance in the tree owns one
#endif
    return version != 0 && version_of(type) == version;
  }
};

// The layout of one model, and everything that must be unchanged for it to be valid. Modules and
// tensors are not owned, only their addresses are compared: while the model is alive, equal
// addresses and equal metadata mean an equal layout, even if an object was replaced by another one
// at the same address.
struct Entry {
  Tree tree;
  std::vector<size_t> rows;  // positions in the signature of each tensor's first name
  Metadata metadata;         // of the rows
  std::vector<Class> classes;
  std::vector<py::object> keys;  // owned, so that no other string gets their addresses
  py::object layout;
  py::object weakref;

  void remember(Tree t) {
    tree = std::move(t);
    std::unordered_set<PyObject*> seen;
    for (PyObject* object : tree.signature) {
      if (object == nullptr || !seen.insert(object).second) continue;
      if (PyType_Check(object)) classes.emplace_back(reinterpret_cast<PyTypeObject*>(object));
      if (PyUnicode_Check(object)) keys.push_back(py::reinterpret_borrow<py::object>(object));
    }
  }
};

// One cache with buffers and one without; the key is the model's address. Never destroyed: Python
// objects must not be released after the interpreter has ended.
using Cache = std::unordered_map<PyObject*, Entry>;
Cache& cache(bool buffers) {
  static Cache* const caches = new Cache[2];
  return caches[buffers];
}

// A weak reference that removes the model's cache entry when the model is freed.
py::object weakref_with_cleanup(PyObject* module, bool buffers) {
  const py::cpp_function remove([module, buffers](py::handle) {
    // The entry leaves the cache before it is destroyed: its destructors may run Python code that
    // uses the cache.
    const auto entry = cache(buffers).extract(module);
  });
  auto ref = py::reinterpret_steal<py::object>(PyWeakref_NewRef(module, remove.ptr()));
  if (!ref) PyErr_Clear();
  return ref;
}

// A Python list of the tensors of all rows.
py::list tensors_of(const Tree& tree, const std::vector<size_t>& rows) {
  // Python code could destroy `tree`, `rows` and the tensors.
  const GarbageCollectorDisabled no_collection;
  py::list out(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    PyObject* tensor = tree.signature[rows[i]];
    Py_INCREF(tensor);
    PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), tensor);
  }
  return out;
}

bool is_valid(const Entry& entry, const Tree& tree) {
  if (!(entry.tree == tree)) return false;
  for (const Class& c : entry.classes) {
    if (!c.is_unchanged()) return false;
  }
  return entry.metadata.describes([&](size_t i) { return tree.signature[entry.rows[i]]; });
}

// Fills an entry from a tree. A tensor is listed under its first name; its other names are aliases.
bool make_entry(py::handle module, Tree tree, py::handle make_layout, Entry& entry) {
  const auto names = names_of_members(tree);
  if (!names) return false;
  std::unordered_map<PyObject*, size_t> row_of;
  std::vector<std::vector<std::string>> names_of_row;
  size_t parameters = 0;
  for (size_t m = 0; m < tree.members.size(); ++m) {
    PyObject* tensor = tree.signature[tree.members[m]];
    const auto [found, is_new] = row_of.try_emplace(tensor, names_of_row.size());
    if (is_new) {
      entry.rows.push_back(tree.members[m]);
      entry.metadata.add(tensor);
      names_of_row.emplace_back();
      if (m < tree.parameters) ++parameters;
    }
    names_of_row[found->second].push_back((*names)[m]);
  }
  py::tuple first(names_of_row.size()), others(names_of_row.size());
  for (size_t i = 0; i < names_of_row.size(); ++i) {
    const auto& all = names_of_row[i];
    py::tuple rest(all.size() - 1);
    for (size_t k = 1; k < all.size(); ++k) rest[k - 1] = py::str(all[k]);
    first[i] = py::str(all[0]);
    others[i] = rest;
  }
  entry.remember(std::move(tree));
  const py::list tensors = tensors_of(entry.tree, entry.rows);
  entry.layout = make_layout(module, first, others, parameters, tensors);  // runs Python code
  return true;
}

}  // namespace

py::object walk(py::handle module, bool buffers, py::handle make_layout) {
  thread_local Tree scratch;  // its memory is reused from call to call
  Tree tree = std::move(scratch);
  tree.clear();
  const auto put_back = [](Tree& t) {
    if (t.signature.capacity() < kMaxScratch) scratch = std::move(t);
  };
  if (!read_tree(module.ptr(), buffers, tree)) {
    PyErr_Clear();
    put_back(tree);
    return py::none();
  }
  const auto found = cache(buffers).find(module.ptr());
  if (found != cache(buffers).end() && is_valid(found->second, tree)) {
    py::object layout = found->second.layout;  // copied before Python code can change the cache
    py::list tensors = tensors_of(tree, found->second.rows);
    put_back(tree);
    return py::make_tuple(std::move(layout), std::move(tensors));
  }
  if (!has_native_tensors(tree)) {
    put_back(tree);
    return py::none();
  }
  const std::vector<py::object> owned = tree.owned();  // Python code runs from here on
  Entry entry;
  if (!make_entry(module, std::move(tree), make_layout, entry)) return py::none();
  py::tuple result = py::make_tuple(entry.layout, tensors_of(entry.tree, entry.rows));
  entry.weakref = weakref_with_cleanup(module.ptr(), buffers);
  if (entry.weakref) {
    // The old entry is destroyed after the new one is stored: destroying it may run Python code.
    std::swap(cache(buffers)[module.ptr()], entry);
  }
  return result;
}

size_t cached_layouts() { return cache(false).size() + cache(true).size(); }

}  // namespace paramstats
