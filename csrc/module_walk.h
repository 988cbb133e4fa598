// Lists the tensors of an nn.Module and caches one layout per model while it is valid.
#pragma once

#include <pybind11/pybind11.h>

namespace paramstats {

// Returns the tuple (layout, tensors) of a module. `tensors` is a list of all tensors that
// `module.named_parameters()` lists (followed by those of `named_buffers()` if `buffers`), each
// tensor once. `layout` is the result of make_layout(module, names, aliases, parameters, tensors):
//
//     names        tuple of str: the first name of each tensor
//     aliases      tuple of tuples of str: the other names of each tensor
//     parameters   int: how many of the tensors are parameters
//
// make_layout is called again only if the model has changed since the last call: a module, a name,
// or a tensor's sharing, type, shape, dtype, device or requires_grad.
//
// Returns None if the module tree cannot be read this way, e.g. if a class in it overrides
// named_parameters. The caller then lists the module with its own Python methods.
pybind11::object walk(pybind11::handle module, bool buffers, pybind11::handle make_layout);

// The number of cached layouts. A layout is deleted together with its model.
size_t cached_layouts();

}  // namespace paramstats
