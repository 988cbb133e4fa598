// Reads `_parameters`, `_buffers` and `_modules` directly. While the tree is read no Python code
// runs, neither a key's __eq__ nor what the garbage collector finalizes, so nothing can change it
// (the GIL is held). Whatever comes after that and may run Python code, as making a list may, comes
// after references to all that is still needed were taken.
#include "module_walk.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace paramstats {
namespace {

// Deeper than this, or more modules than this, and the tree is most likely a cycle or modules
// shared within shared modules without end: left to Python. (Depth costs no stack here.)
constexpr size_t kMaxDepth = 10'000;
constexpr size_t kMaxVisits = 200'000;

// Pointers: a larger tree's memory is not kept for the next call.
constexpr size_t kMostScratch = 1 << 20;

// An attribute of every module, and where it stood in the last dictionary it was found in. Interned
// once; never freed, because extension modules are not unloaded.
struct Attribute {
  PyObject* name;
  Py_ssize_t position = 0;
  explicit Attribute(const char* text) : name(PyUnicode_InternFromString(text)) {}
};
struct Attributes {
  Attribute parameters{"_parameters"}, buffers{"_buffers"}, modules{"_modules"};
};
Attributes& attributes_of_modules() {
  static Attributes a;
  return a;
}

// While it lives the garbage collector, and with it Python code, does not run: an instance that was
// never asked for its __dict__ has it made, which may set off a collection.
class WithoutCollector {
 public:
  WithoutCollector() : was_enabled_(PyGC_Disable() != 0) {}
  ~WithoutCollector() {
    if (was_enabled_) PyGC_Enable();
  }
  WithoutCollector(const WithoutCollector&) = delete;
  WithoutCollector& operator=(const WithoutCollector&) = delete;

 private:
  bool was_enabled_;
};

// nn.Module and the functions by which it lists itself; a class whose are others lists itself
// otherwise.
struct ModuleClass {
  py::object type = py::module_::import("torch.nn").attr("Module");
  std::vector<std::pair<py::str, py::object>> listing;
  PyTypeObject* python_type() const { return reinterpret_cast<PyTypeObject*>(type.ptr()); }
  ModuleClass() {
    for (const char* name :
         {"parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules",
          "children", "named_children", "_named_members", "__getattribute__"}) {
      listing.emplace_back(py::str(name), type.attr(name));
    }
  }
};
const ModuleClass& module_class() {
  static const ModuleClass* const c = new ModuleClass();  // outlives the interpreter's shutdown
  return *c;
}

bool lists_itself_plainly(PyObject* module, PyTypeObject* type) {
  PyObject* object = reinterpret_cast<PyObject*>(type);
  for (const auto& [name, plain] : module_class().listing) {
    const py::object own = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
    if (!own) PyErr_Clear();
    if (!own.is(plain)) return false;
  }
  // A property of the class would come before what the instance has under that name.
  const Attributes& a = attributes_of_modules();
  for (const Attribute* attribute : {&a.parameters, &a.buffers, &a.modules}) {
    if (_PyType_Lookup(type, attribute->name) != nullptr) return false;
  }
  const auto attributes = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(module, nullptr));
  for (const auto& [name, plain] : module_class().listing) {
    if (attributes.contains(name)) return false;
  }
  return true;
}

// A tree as it was found: every pointer in it borrowed.
struct Tree {
  // What, compared with an earlier walk's, tells whether anything moved: for each module its
  // address, its type and the key and value of each of its entries, in order.
  std::vector<PyObject*> signature;
  std::vector<Py_ssize_t> attributes;  // of each module, how many: an override may be among them
  std::vector<size_t> members;         // positions in `signature` of entries that are tensors
  size_t parameters = 0;               // how many of `members` are parameters; buffers follow
  size_t visits = 0;

  // A module whose children are being read, and the next of them.
  struct Open {
    PyObject* children;
    Py_ssize_t next;
  };
  std::vector<Open> open;  // from the root on

  bool operator==(const Tree& other) const {
    return signature == other.signature && attributes == other.attributes;
  }

  void clear() {
    signature.clear();
    attributes.clear();
    members.clear();
    open.clear();
    parameters = visits = 0;
  }

  // References to everything, so that Python code may run.
  std::vector<py::object> owned() const {
    std::vector<py::object> objects;
    objects.reserve(signature.size());
    for (PyObject* object : signature) {
      if (object != nullptr) objects.push_back(py::reinterpret_borrow<py::object>(object));
    }
    return objects;
  }
};

bool is_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ||
         PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// DTensor, once somebody has met one: its operators are Python code, its sizes are not.
PyTypeObject* distributed = nullptr;

// Whether sizes and the like can be asked for without a subclass's Python code answering.
bool answers_by_itself(PyObject* object) {
  const c10::TensorImpl& t = *THPVariable_Unpack(object).unsafeGetTensorImpl();
  const bool by_python =
      t.key_set().has(c10::DispatchKey::Python) && Py_TYPE(object) != distributed;
  return !by_python && !t.is_nested() && !t.has_symbolic_sizes_strides();
}

bool is_same(PyObject* key, PyObject* name) { return key == name; }

// Whether it is a plain string of the same text: another one where a dictionary was unpickled.
bool is_equal(PyObject* key, PyObject* name) {
  return key == name ||
         (PyUnicode_CheckExact(key) && PyUnicode_GET_LENGTH(key) == PyUnicode_GET_LENGTH(name) &&
          PyUnicode_Compare(key, name) == 0);
}

// The value of the first key that is the attribute's name, borrowed, or null.
template <bool (*is_name)(PyObject*, PyObject*)>
PyObject* search(PyObject* attributes, Attribute& attribute) {
  PyObject *key, *value;
  for (Py_ssize_t i = 0, at = 0; PyDict_Next(attributes, &i, &key, &value); at = i) {
    if (!is_name(key, attribute.name)) continue;
    attribute.position = at;
    return value;
  }
  return nullptr;
}

// A borrowed plain dict of the module's, or null. Not looked up, which may run another key's
// __eq__: found at the position where it was in the last module, or by a search.
PyObject* dict_of(PyObject* attributes, Attribute& attribute) {
  PyObject *key, *value;
  Py_ssize_t i = attribute.position;
  if (!PyDict_Next(attributes, &i, &key, &value) || !is_equal(key, attribute.name)) {
    value = search<is_same>(attributes, attribute);
    if (value == nullptr) value = search<is_equal>(attributes, attribute);
  }
  return value != nullptr && PyDict_CheckExact(value) ? value : nullptr;
}

// Adds a module and its own entries to the tree and opens it. False: not readable.
bool enter(PyObject* module, Attribute& kind, Tree& tree) {
  if (tree.open.size() > kMaxDepth || ++tree.visits > kMaxVisits) return false;
  // Of nothing else is even the dictionary asked for: a built-in type would be given a new one.
  if (!PyType_IsSubtype(Py_TYPE(module), module_class().python_type())) return false;
  // The owned reference may go at once: the module keeps its attributes alive.
  PyObject* attributes = PyObject_GenericGetDict(module, nullptr);
  if (attributes == nullptr) return false;
  Py_DECREF(attributes);
  PyObject* own = dict_of(attributes, kind);
  PyObject* children = dict_of(attributes, attributes_of_modules().modules);
  if (own == nullptr || children == nullptr) return false;

  tree.attributes.push_back(PyDict_GET_SIZE(attributes));
  tree.signature.push_back(module);
  tree.signature.push_back(reinterpret_cast<PyObject*>(Py_TYPE(module)));
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(own, &i, &key, &value);) {
    tree.signature.push_back(key);
    tree.signature.push_back(value);
    if (value == Py_None) continue;
    if (!is_tensor(value) || !answers_by_itself(value)) return false;
    tree.members.push_back(tree.signature.size() - 1);
  }
  tree.open.push_back({children, 0});
  return true;
}

// Adds a module's entries, its own first, then its children's. Not by recursion: a tree may be
// deeper than the stack of a small thread.
bool visit(PyObject* module, Attribute& kind, Tree& tree) {
  if (!enter(module, kind, tree)) return false;
  while (!tree.open.empty()) {
    Tree::Open& last = tree.open.back();
    PyObject *key, *value;
    if (!PyDict_Next(last.children, &last.next, &key, &value)) {
      tree.signature.push_back(nullptr);  // the end of this module
      tree.open.pop_back();
      continue;
    }
    tree.signature.push_back(key);
    tree.signature.push_back(value);
    if (value != Py_None && !enter(value, kind, tree)) return false;
  }
  return true;
}

bool read_tree(PyObject* module, bool buffers, Tree& tree) {
  module_class();  // made by Python code, the first time
  const WithoutCollector without_collector;
  if (!visit(module, attributes_of_modules().parameters, tree)) return false;
  tree.parameters = tree.members.size();
  return !buffers || visit(module, attributes_of_modules().buffers, tree);
}

// The names of a tree's members, found again along the signature.
struct Names {
  std::vector<std::string> of_member;
  bool readable = true;

  explicit Names(const Tree& tree) : tree_(tree) {
    const auto& s = tree.signature;
    while (at_ < s.size() && readable) {
      if (prefixes_.empty()) {
        open("");
      } else if (s[at_] == nullptr) {
        prefixes_.pop_back();
        ++at_;
      } else {
        entry();
      }
    }
  }

 private:
  const Tree& tree_;
  size_t at_ = 0;
  std::vector<std::string> prefixes_;  // of the modules that are open

  void open(const std::string& name) {
    PyTypeObject* type = reinterpret_cast<PyTypeObject*>(tree_.signature[at_ + 1]);
    readable = lists_itself_plainly(tree_.signature[at_], type);
    prefixes_.push_back(name.empty() ? "" : name + ".");
    at_ += 2;
  }

  // A key and a value: a tensor, None or a child, which follows.
  void entry() {
    PyObject* key = tree_.signature[at_];
    Py_ssize_t size = 0;
    // A subclass may make of itself what it likes when torch puts it behind a prefix.
    const char* text = PyUnicode_CheckExact(key) ? PyUnicode_AsUTF8AndSize(key, &size) : nullptr;
    if (text == nullptr) {  // no such string, or one that UTF-8 cannot hold
      PyErr_Clear();
      readable = false;
      return;
    }
    const std::string name = prefixes_.back() + std::string(text, size);
    const size_t value = at_ + 1;
    at_ += 2;
    const bool is_member =
        of_member.size() < tree_.members.size() && tree_.members[of_member.size()] == value;
    if (is_member) {
      of_member.push_back(name);
    } else if (tree_.signature[value] != Py_None) {
      open(name);
    }
  }
};

// What a layout says of a tensor, to be compared without making Python objects.
struct Meta {
  PyTypeObject* type;
  at::ScalarType dtype;
  c10::Device device;
  bool requires_grad;
  std::vector<int64_t> sizes;

  explicit Meta(PyObject* object)
      : Meta(object, *THPVariable_Unpack(object).unsafeGetTensorImpl()) {}
  Meta(PyObject* object, const c10::TensorImpl& t)
      : type(Py_TYPE(object)),
        dtype(c10::typeMetaToScalarType(t.dtype())),
        device(t.device()),
        requires_grad(t.requires_grad()),
        sizes(t.sizes().vec()) {}

  bool describes(PyObject* object) const {
    const c10::TensorImpl& t = *THPVariable_Unpack(object).unsafeGetTensorImpl();
    return type == Py_TYPE(object) && c10::typeMetaToScalarType(t.dtype()) == dtype &&
           t.device() == device && t.requires_grad() == requires_grad && t.sizes() == sizes;
  }
};

// A class as it was when it was found to list itself plainly. Not owned: a class may own a model,
// which would then never go.
struct Class {
  py::object weakref;
  PyTypeObject* type;
  unsigned int version;  // Python's own, which changes with the class or a base of it

  explicit Class(PyTypeObject* t)
      : weakref(py::reinterpret_steal<py::object>(
            PyWeakref_NewRef(reinterpret_cast<PyObject*>(t), nullptr))),
        type(t),
        version(version_of(t)) {
    if (!weakref) PyErr_Clear();
  }

  static unsigned int version_of(PyTypeObject* t) {
#if PY_VERSION_HEX < 0x030b0000  // where a flag says whether the number holds
    if (!PyType_HasFeature(t, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    return t->tp_version_tag;
  }

  bool is_unchanged() const {
    // No other class can have the address of one that is alive.
    PyObject* alive = nullptr;
    if (!weakref || PyWeakref_GetRef(weakref.ptr(), &alive) != 1) return false;
    Py_DECREF(alive);  // not the last reference: an instance in the tree holds one
    return version != 0 && version_of(type) == version;
  }
};

// The layout of one model, and all that must still be so for it to be true. Modules and tensors are
// not owned either: that two pointers of a live model are equal means what it meant before, even if
// both objects were exchanged.
struct Entry {
  Tree tree;
  std::vector<size_t> rows;  // positions in the signature of each tensor's first name
  std::vector<Meta> metas;   // one a row
  std::vector<Class> classes;
  std::vector<py::object> keys;  // owned: their addresses must stay theirs, and they own nothing
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

// By the model's address and whether buffers are listed. Never destroyed: Python objects must not
// be let go after the interpreter has ended.
using Cache = std::unordered_map<PyObject*, Entry>;
Cache& cache(bool buffers) {
  static Cache* const caches = new Cache[2];
  return caches[buffers];
}

py::object weakref_that_forgets(PyObject* module, bool buffers) {
  const py::cpp_function forget([module, buffers](py::handle) {
    // Taken out whole before it is let go, which may run Python code that asks the cache.
    const auto gone = cache(buffers).extract(module);
  });
  auto ref = py::reinterpret_steal<py::object>(PyWeakref_NewRef(module, forget.ptr()));
  if (!ref) PyErr_Clear();
  return ref;
}

// A list of the rows' tensors. Making one may set off the garbage collector, hence the references
// taken before.
py::list tensors_of(const Tree& tree, const std::vector<size_t>& rows) {
  std::vector<py::object> tensors;
  tensors.reserve(rows.size());
  for (size_t row : rows) {
    tensors.push_back(py::reinterpret_borrow<py::object>(tree.signature[row]));
  }
  py::list out(tensors.size());  // from here on `tree` and `rows` may be gone
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), tensors[i].release().ptr());
  }
  return out;
}

bool still_true(const Entry& entry, const Tree& tree) {
  if (!(entry.tree == tree)) return false;
  for (const Class& c : entry.classes) {
    if (!c.is_unchanged()) return false;
  }
  for (size_t i = 0; i < entry.rows.size(); ++i) {
    if (!entry.metas[i].describes(tree.signature[entry.rows[i]])) return false;
  }
  return true;
}

// A tensor is a row under its first name; its other names are aliases.
bool make_entry(Tree tree, py::handle make_layout, Entry& entry) {
  const Names names(tree);
  if (!names.readable) return false;
  std::unordered_map<PyObject*, size_t> row_of;
  std::vector<std::vector<std::string>> names_of_row;
  size_t parameters = 0;
  for (size_t m = 0; m < tree.members.size(); ++m) {
    PyObject* tensor = tree.signature[tree.members[m]];
    const auto [found, is_new] = row_of.try_emplace(tensor, names_of_row.size());
    if (is_new) {
      entry.rows.push_back(tree.members[m]);
      entry.metas.emplace_back(tensor);
      names_of_row.emplace_back();
      if (m < tree.parameters) ++parameters;
    }
    names_of_row[found->second].push_back(names.of_member[m]);
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
  entry.layout = make_layout(first, others, parameters, tensors);  // may run any Python code
  return true;
}

}  // namespace

py::object walk(py::handle module, bool buffers, py::handle make_layout) {
  thread_local Tree scratch;  // its memory is used again from call to call
  Tree tree = std::move(scratch);
  tree.clear();
  const auto put_back = [](Tree& t) {
    if (t.signature.capacity() < kMostScratch) scratch = std::move(t);
  };
  if (!read_tree(module.ptr(), buffers, tree)) {
    PyErr_Clear();
    put_back(tree);
    return py::none();
  }
  const auto found = cache(buffers).find(module.ptr());
  if (found != cache(buffers).end() && still_true(found->second, tree)) {
    py::object layout = found->second.layout;  // before anything that may change the cache
    py::list tensors = tensors_of(tree, found->second.rows);
    put_back(tree);
    return py::make_tuple(std::move(layout), std::move(tensors));
  }
  const std::vector<py::object> owned = tree.owned();
  Entry entry;
  if (!make_entry(std::move(tree), make_layout, entry)) return py::none();
  py::tuple result = py::make_tuple(entry.layout, tensors_of(entry.tree, entry.rows));
  entry.weakref = weakref_that_forgets(module.ptr(), buffers);
  if (entry.weakref) {
    // The old entry goes after the new one is in: letting go of it may run Python code.
    std::swap(cache(buffers)[module.ptr()], entry);
  }
  return result;
}

void read_distributed(py::handle type) {
  if (reinterpret_cast<PyTypeObject*>(type.ptr()) == distributed) return;
  Py_INCREF(type.ptr());  // for good: it is one of torch's own
  distributed = reinterpret_cast<PyTypeObject*>(type.ptr());
}

size_t cached_layouts() { return cache(false).size() + cache(true).size(); }

}  // namespace paramstats
