// Reads an nn.Module's tree directly from the `_parameters`, `_buffers` and `_modules` of its
// modules.
#include "module_tree.h"

#include <algorithm>
#include <utility>

#include "torch_abi.h"

namespace py = pybind11;

namespace paramstats {
namespace {

// A tree that is deeper or has more modules than this is most likely a cycle, or has modules that
// are shared many times over. Python handles it. (Depth costs no stack here.)
constexpr size_t kMaxDepth = 10'000;
constexpr size_t kMaxVisits = 200'000;

// The name of an attribute that every module has, and its position in the last dictionary that
// contained it. The name is interned once and never freed: extension modules are not unloaded.
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

// nn.Module and its methods that list tensors and modules.
struct ModuleClass {
  py::object type;
  std::vector<std::pair<py::str, py::object>> methods;
  PyTypeObject* python_type() const { return reinterpret_cast<PyTypeObject*>(type.ptr()); }
  explicit ModuleClass(py::object module) : type(std::move(module)) {
    for (const char* name :
         {"parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules",
          "children", "named_children", "_named_members", "__getattribute__"}) {
      methods.emplace_back(py::str(name), type.attr(name));
    }
  }
};
const ModuleClass* module_class = nullptr;  // never freed: may outlive the interpreter

// Whether neither the class nor the instance overrides how a module lists its tensors.
bool lists_as_nn_module(PyObject* module, PyTypeObject* type) {
  PyObject* object = reinterpret_cast<PyObject*>(type);
  for (const auto& [name, original] : module_class->methods) {
    const py::object method =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name.ptr()));
    if (!method) PyErr_Clear();
    if (!method.is(original)) return false;
  }
  // A property of the class takes precedence over an attribute of the instance.
  const Attributes& a = attributes_of_modules();
  for (const Attribute* attribute : {&a.parameters, &a.buffers, &a.modules}) {
    if (_PyType_Lookup(type, attribute->name) != nullptr) return false;
  }
  const auto attributes = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(module, nullptr));
  for (const auto& [name, original] : module_class->methods) {
    if (attributes.contains(name)) return false;
  }
  return true;
}

// torch's DTensor, once set_dtensor_class was called. Its operators are Python code, its sizes are
// not.
PyTypeObject* dtensor_class = nullptr;

// Whether reading the size and other metadata of a tensor runs no Python code of a subclass, and
// the sizes are numbers. (To ask for symbolic sizes is an error, which torch 2.10 and 2.11
// print.)
bool has_native_metadata(PyObject* object) {
  const uint64_t others =
      torch_abi::keys_of(torch_abi::impl_of(object)) & ~torch_abi::api.metadata_keys;
  return (Py_TYPE(object) == dtensor_class ? others & ~torch_abi::api.python_keys : others) == 0;
}

bool is_same(PyObject* key, PyObject* name) { return key == name; }

// Whether the key is a plain string with the same text. It is another object if the dictionary was
// unpickled.
bool is_equal(PyObject* key, PyObject* name) {
  return key == name ||
         (PyUnicode_CheckExact(key) && PyUnicode_GET_LENGTH(key) == PyUnicode_GET_LENGTH(name) &&
          PyUnicode_Compare(key, name) == 0);
}

// Returns the value of the first key that matches the attribute's name (borrowed), or null.
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

// Returns a dictionary attribute of a module (borrowed), or null if it is not a plain dict. A
// normal lookup may run the __eq__ of another key, so this tries the position where the last module
// had the attribute and then searches.
PyObject* dict_of(PyObject* attributes, Attribute& attribute) {
  PyObject *key, *value;
  Py_ssize_t i = attribute.position;
  if (!PyDict_Next(attributes, &i, &key, &value) || !is_equal(key, attribute.name)) {
    value = search<is_same>(attributes, attribute);
    if (value == nullptr) value = search<is_equal>(attributes, attribute);
  }
  return value != nullptr && PyDict_CheckExact(value) ? value : nullptr;
}

// Adds a module and its own entries to the tree and opens it. Returns false if it is not readable.
bool enter(PyObject* module, Attribute& kind, Tree& tree) {
  if (tree.open.size() > kMaxDepth || ++tree.visits > kMaxVisits) return false;
  // Check the type before the dictionary: asking a built-in type for one would create it.
  if (!PyType_IsSubtype(Py_TYPE(module), module_class->python_type())) return false;
  // The module keeps its attributes alive, so the reference can be released at once.
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
    if (value != Py_None) tree.members.push_back(tree.signature.size() - 1);
  }
  tree.open.push_back({children, 0});
  return true;
}

// Adds the entries of a module, then those of its children. Does not recurse: a tree may be deeper
// than the stack of a small thread allows.
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

// The full names of a tree's members, derived from its signature.
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
  std::vector<std::string> prefixes_;  // of the open modules

  void open(const std::string& name) {
    PyTypeObject* type = reinterpret_cast<PyTypeObject*>(tree_.signature[at_ + 1]);
    readable = lists_as_nn_module(tree_.signature[at_], type);
    prefixes_.push_back(name.empty() ? "" : name + ".");
    at_ += 2;
  }

  // Reads a key and its value: a tensor, None, or a child module whose entries follow.
  void entry() {
    PyObject* key = tree_.signature[at_];
    Py_ssize_t size = 0;
    // A subclass of str may change the result when torch adds a prefix, so only str is accepted.
    const char* text = PyUnicode_CheckExact(key) ? PyUnicode_AsUTF8AndSize(key, &size) : nullptr;
    if (text == nullptr) {  // not a str, or not encodable as UTF-8
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

void set_module_class(const py::object& type) { module_class = new ModuleClass(type); }

bool read_tree(PyObject* module, bool buffers, Tree& tree) {
  const GarbageCollectorDisabled no_collection;
  if (!visit(module, attributes_of_modules().parameters, tree)) return false;
  tree.parameters = tree.members.size();
  return !buffers || visit(module, attributes_of_modules().buffers, tree);
}

bool has_native_tensors(const Tree& tree) {
  return std::all_of(tree.members.begin(), tree.members.end(), [&tree](size_t member) {
    PyObject* object = tree.signature[member];
    return torch_abi::is_tensor(object) && has_native_metadata(object);
  });
}

std::optional<std::vector<std::string>> names_of_members(const Tree& tree) {
  Names names(tree);
  if (!names.readable) return std::nullopt;
  return std::move(names.of_member);
}

void set_dtensor_class(py::handle type) {
  if (reinterpret_cast<PyTypeObject*>(type.ptr()) == dtensor_class) return;
  Py_INCREF(type.ptr());  // never released: the class belongs to torch
  dtensor_class = reinterpret_cast<PyTypeObject*>(type.ptr());
}

}  // namespace paramstats
