"""List the named tensors of a source: a module, a mapping, or (name, tensor) pairs.

The native backend lists plain modules itself, which is faster (csrc/module_tree.cpp). Modules that
override `named_parameters` or the like, and all modules in the reference backend, are listed here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from paramstats._core.names import Patterns, passes
from paramstats._core.shard import LocalShard, children
from paramstats._core.torch_private import without_modes

MakeLayout = Callable[
    [Any, tuple[str, ...], tuple[tuple[str, ...], ...], int, list[torch.Tensor]], Any
]

_MAX_VISITS = 10
"""Visits per module beyond which not every name is listed. The number of paths doubles with each
level of modules that are shared within shared modules, and is infinite in a cycle."""


def walk(
    module: torch.nn.Module, buffers: bool, make_layout: MakeLayout
) -> tuple[Any, list[torch.Tensor]]:
    """Return the layout of a module's parameters, then buffers, and the tensors themselves."""
    rows = _Rows()
    every_name = _few_paths(module)
    try:
        rows.add_all(_named(module.named_parameters, every_name))
        parameters = len(rows.tensors)
        if buffers:
            rows.add_all(_named(module.named_buffers, every_name))
    except RecursionError as error:
        if not _is_from_deep_nesting(error):
            raise
        raise RecursionError(
            f"paramstats.summarize: expected modules that torch can list within Python's recursion "
            f"limit of {sys.getrecursionlimit()}, got modules nested too deeply ({error}); raise "
            f"the limit with sys.setrecursionlimit"
        ) from error
    return make_layout(module, rows.names, rows.aliases, parameters, rows.tensors), rows.tensors


def walk_named(
    source: Any, include: Patterns | None, exclude: Patterns, make_layout: MakeLayout
) -> tuple[Any, list[torch.Tensor]]:
    """Return the layout and the tensors of a mapping or of (name, tensor) pairs.

    Two names for one tensor, or for the same elements in memory, give one row. A `state_dict`
    holds tied parameters in the second way.
    """
    rows = _Rows(key=_memory)
    named: dict[str, Any] = {}
    for name, value in _pairs(source):
        _check_name(name)
        if not isinstance(value, (torch.Tensor, LocalShard)):
            if not passes((name,), include, exclude):
                continue
            raise _no_tensor(name, value, _remedy(name, value))
        if name in named:
            raise ValueError(f"paramstats.summarize: expected every name once, got {name!r} twice")
        named[name] = value
    with without_modes():
        for name, value in named.items():
            rows.add(name, value)
    layout = make_layout(source, rows.names, rows.aliases, len(rows.tensors), rows.tensors)
    return layout, rows.tensors


class _Rows:
    """Collects tensors in the order of their first name, with all their names."""

    def __init__(self, key: Callable[[torch.Tensor], Any] = id) -> None:
        self.tensors: list[Any] = []
        self._key = key
        self._row_of: dict[Any, int] = {}
        self._names: list[str] = []
        self._aliases: dict[int, list[str]] = {}

    def add(self, name: str, tensor: Any) -> None:
        row = self._row_of.setdefault(self._key(tensor), len(self.tensors))
        if row == len(self.tensors):
            self.tensors.append(tensor)
            self._names.append(name)
        else:
            self._aliases.setdefault(row, []).append(name)

    def add_all(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in _checked_pairs(named):
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                _check_name(name)
                raise _no_tensor(name, tensor, "a module's parameters and buffers are tensors")
            self.add(name, tensor)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    @property
    def aliases(self) -> tuple[tuple[str, ...], ...]:
        return tuple([tuple(self._aliases.get(row, ())) for row in range(len(self._names))])


def _is_from_deep_nesting(error: RecursionError) -> bool:
    """Return whether deeply nested modules caused this RecursionError."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return codes.count(torch.nn.Module.named_modules.__code__) > len(codes) // 2


def _few_paths(module: torch.nn.Module) -> bool:
    """Return whether the modules have few enough paths to list all of them."""
    modules, visits, remaining = set(), 0, [module]
    while remaining:  # not by named_modules, which follows a cycle until the stack is full
        visited = remaining.pop()
        modules.add(id(visited))
        visits += 1
        if visits > _MAX_VISITS * len(modules) + 1000:
            return False
        remaining.extend(children(visited))
    return True


def _named(named: Callable[..., Iterable[tuple[str, Any]]], every_name: bool) -> Any:
    """Return (name, tensor) pairs, with all names of shared tensors if `every_name` is possible."""
    if every_name:
        with contextlib.suppress(TypeError):  # a module whose method has no such argument
            return list(named(remove_duplicate=False))
    return list(named())


def _memory(tensor: torch.Tensor) -> Any:
    """Return a key that is equal for tensors with the same memory and the same gradient."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_nested:
        return id(tensor)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    try:  # not data_ptr(), which would make a copy-on-write tensor copy itself
        storage = tensor.untyped_storage()._cdata
    except NotImplementedError:  # a wrapper of functorch's
        return id(tensor)
    grad = tensor.grad if tensor.is_leaf else None
    return (
        tensor.device,
        storage,
        tensor.storage_offset(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
        id(grad),
    )


def _pairs(source: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(source, Mapping):
        yield from source.items()
        return
    is_trainer = isinstance(getattr(source, "model", None), torch.nn.Module)
    expected = "an nn.Module, a mapping of names to tensors or an iterable of (name, tensor) pairs"
    if (
        is_trainer
        or isinstance(source, (str, bytes, torch.Tensor))
        or not isinstance(source, Iterable)
    ):
        hint = ""
        if isinstance(source, torch.Tensor):
            hint = "; for one tensor pass {'name': tensor}"
        elif isinstance(source, torch.optim.Optimizer):
            hint = "; pass the model, and this as optimizer="
        elif isinstance(source, (str, bytes, os.PathLike)):
            hint = "; for a checkpoint call paramstats.checkpoints.summarize_file(path)"
        elif is_trainer:
            hint = "; pass its model: source.model"
        elif isinstance(source, type):
            hint = "; that is a class, pass an instance of it"
        raise TypeError(
            f"paramstats.summarize: expected {expected}, got {_type_name(source)}{hint}"
        )
    yield from _checked_pairs(source)


def _checked_pairs(source: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for position, pair in enumerate(source):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            hint = ""
            if isinstance(pair, torch.Tensor):
                hint = "; for a model's parameters pass the model or model.named_parameters()"
            raise TypeError(
                f"paramstats.summarize: expected (name, tensor) pairs, got {_type_name(pair)} "
                f"at position {position}{hint}"
            )
        yield pair[0], pair[1]


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(
            f"paramstats.summarize: expected names to be str, got {type(name).__name__} "
            f"for {name!r}"
        )


def _no_tensor(name: str, value: Any, remedy: str) -> TypeError:
    return TypeError(
        f"paramstats.summarize: expected a torch.Tensor, got {_type_name(value)} for {name!r}; "
        f"{remedy}"
    )


def _remedy(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"to summarize the tensors in it, pass source[{name!r}]"
    # hasattr(value, ...) is always true for a torch.fx.Proxy.
    if hasattr(type(value), "__array_interface__"):
        return "convert it with torch.from_numpy"
    return "leave it out with exclude=..."


def _type_name(value: Any) -> str:
    cls = type(value)
    return (
        cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    )
