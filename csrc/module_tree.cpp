#include "module_tree.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace py = pybind11;

namespace paramstats {
namespace {

// Deeper than this, or more modules than this, and the tree is most likely a cycle or modules
// shared within shared modules without end: left to Python. (Depth costs no stack here.)
constexpr size_t kMaxDepth = 10'000;
constexpr size_t kMaxVisits = 200'000;

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

}  // namespace

std::vector<py::object> Tree::owned() const {
  std::vector<py::object> objects;
  objects.reserve(signature.size());
  for (PyObject* object : signature) {
    if (object != nullptr) objects.push_back(py::reinterpret_borrow<py::object>(object));
  }
  return objects;
}

bool read_tree(PyObject* module, bool buffers, Tree& tree) {
  module_class();  // made by Python code, the first time
  const WithoutCollector without_collector;
  if (!visit(module, attributes_of_modules().parameters, tree)) return false;
  tree.parameters = tree.members.size();
  return !buffers || visit(module, attributes_of_modules().buffers, tree);
}

std::optional<std::vector<std::string>> names_of_members(const Tree& tree) {
  Names names(tree);
  if (!names.readable) return std::nullopt;
  return std::move(names.of_member);
}

void read_distributed(py::handle type) {
  if (reinterpret_cast<PyTypeObject*>(type.ptr()) == distributed) return;
  Py_INCREF(type.ptr());  // for good: it is one of torch's own
  distributed = reinterpret_cast<PyTypeObject*>(type.ptr());
}

}  // namespace paramstats
