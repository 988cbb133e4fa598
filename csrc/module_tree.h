// Reads an nn.Module's tree directly from the `_parameters`, `_buffers` and `_modules` of its
// modules.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

namespace paramstats {

// Disables the garbage collector, which runs Python code, in its scope. Python may start a
// collection when it creates an object, such as a list or the __dict__ of an instance.
class GarbageCollectorDisabled {
 public:
  GarbageCollectorDisabled() : was_enabled_(PyGC_Disable() != 0) {}
  ~GarbageCollectorDisabled() {
    if (was_enabled_) PyGC_Enable();
  }
  GarbageCollectorDisabled(const GarbageCollectorDisabled&) = delete;
  GarbageCollectorDisabled& operator=(const GarbageCollectorDisabled&) = delete;

 private:
  bool was_enabled_;
};

// A module tree at one moment. All its pointers are borrowed.
struct Tree {
  // For each module, in order: its address, its type, and the key and value of each of its entries.
  // Two walks with the same signature have seen the same tree.
  std::vector<PyObject*> signature;
  // The number of attributes of each module: it changes if an instance gets an override. (Not if
  // another attribute is deleted at the same time.)
  std::vector<Py_ssize_t> attributes;
  std::vector<size_t> members;  // positions in `signature` of the entries that are not None
  size_t parameters = 0;        // how many of `members` are parameters; the others are buffers
  size_t visits = 0;            // visited modules; a shared module counts each time

  // A module whose children are being read, and the position of the next child.
  struct Open {
    PyObject* children;
    Py_ssize_t next;
  };
  std::vector<Open> open;  // the current path, from the root down

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

  // Returns references to all objects of the tree, which keep it alive while Python code runs.
  std::vector<pybind11::object> owned() const;
};

// Tells which class is nn.Module. Must be called before `read_tree`.
void set_module_class(const pybind11::object& type);

// Reads the parameters of a module and of all modules in it, followed by the buffers if `buffers`.
// Returns false if the tree cannot be read this way, or is too deep or too large.
//
// The GIL is held and no Python code runs here, neither a key's __eq__ nor a finalizer, so nothing
// can change the tree during the call. Code that runs afterwards and may call Python (creating a
// list may) must own the objects that it still needs: see `owned`.
bool read_tree(PyObject* module, bool buffers, Tree& tree);

// Whether all members are tensors whose metadata can be read without running Python code.
bool has_native_tensors(const Tree& tree);

// Returns the full names of `tree.members`, in order. Returns nullopt if a module overrides how
// modules list their tensors, or if a name is not a string that UTF-8 can encode. May run Python
// code (e.g. of a metaclass), so the caller must hold the result of `tree.owned()`.
std::optional<std::vector<std::string>> names_of_members(const Tree& tree);

// Tells `read_tree` which class is DTensor. DTensors are then read, although their operators are
// Python code: their sizes are not.
void set_dtensor_class(pybind11::handle type);

}  // namespace paramstats
