// From an nn.Module tree to its parameters: a layout for each model, kept while it holds.
#pragma once

#include <pybind11/pybind11.h>

namespace paramstats {

// What `module.named_parameters()` (and `named_buffers()` after it) would list, as a tuple
// (layout, tensors): `tensors` a list with each tensor once, `layout` what
// make_layout(module, names, aliases, parameters, tensors) made of them: names tuple of str, aliases tuple
// of tuples of str, parameters the number of rows that are parameters.
//
// The layout is made anew only if something about the model has changed since the last call: a
// module, a name, a tensor's sharing, type, shape, dtype, device or requires_grad.
//
// None where the tree cannot be read this way (a class of it overrides named_parameters or its
// like, or is no plain nn.Module): then Python has to ask the module itself.
pybind11::object walk(pybind11::handle module, bool buffers, pybind11::handle make_layout);

// How many models' layouts are kept. They go when their model does.
size_t cached_layouts();

}  // namespace paramstats
