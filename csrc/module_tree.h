// An nn.Module's tree, read from the modules' `_parameters`, `_buffers` and `_modules` themselves.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

namespace paramstats {

// A tree as it was found: every pointer in it borrowed.
struct Tree {
  // What, compared with an earlier walk's, tells whether anything moved: for each module its
  // address, its type and the key and value of each of its entries, in order.
  std::vector<PyObject*> signature;
  std::vector<Py_ssize_t> attributes;  // of each module, how many: an override may be among them
  std::vector<size_t> members;         // positions in `signature` of entries that are tensors
  size_t parameters = 0;               // how many of `members` are parameters; buffers follow
  size_t visits = 0;                   // of modules, a shared one each time

  // While it is read: a module whose children are being read, and the next of them.
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
  std::vector<pybind11::object> owned() const;
};

// Reads a module's parameters and those of the modules in it; where `buffers`, those after them.
// False: not readable this way, or too deep, or too large.
//
// No Python code runs meanwhile, neither a key's __eq__ nor what the garbage collector finalizes,
// so nothing can change the tree (the GIL is held). Whatever comes after that and may run Python
// code, as making a list may, has to own what it still needs: see `owned`.
bool read_tree(PyObject* module, bool buffers, Tree& tree);

// The full names of `tree.members`, in order; nullopt where a module of it lists itself in a way of
// its own, or a name is no string that UTF-8 can hold. May run Python code, as of a metaclass: the
// caller holds what `tree.owned()` gave.
std::optional<std::vector<std::string>> names_of_members(const Tree& tree);

// Has `read_tree` read tensors of one more class, DTensor, although its operators are Python code.
void read_distributed(pybind11::handle type);

}  // namespace paramstats
