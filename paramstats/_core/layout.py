"""`Layout`: the names, shapes, dtypes and devices of a model's tensors."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from paramstats._core.descriptions import check_distinct, describe
from paramstats._core.names import Patterns, passes
from paramstats._core.wrapper_names import is_without_wrappers, without_wrappers

_MAX_CACHED = 16
"""Maximum number of key templates and of selections that a layout caches."""


class Keys(NamedTuple):
    """The logger keys of a summary."""

    names: list[str]
    """Every key: row by row, then those of the total and of its gradient."""
    distinct: dict[str, None]
    """The keys without duplicates, in the same order."""
    columns: bytes
    """The positions in `Statistics` of the statistics of a row."""


class Layout:
    """The names, shapes and dtypes of a summary's rows. Immutable.

    All summaries of an unchanged model share one layout, so it also caches what depends on it
    alone: logger keys and selections.

    Args:
        names: the first name of every tensor.
        aliases: the other names of each, where it is tied.
        parameters: how many leading rows are parameters; the others are buffers.
        shapes: None for a lazy parameter.
        dtypes, devices, requires_grad: of each tensor.
        wrapper_names: the full names of each tensor under wrappers such as DDP or torch.compile,
            parallel to its name and aliases; empty where there are no wrappers. They are looked up
            and matched, but not displayed.
        is_sharded: whether this rank holds only a part of any of the tensors.
    """

    __slots__ = (
        "__weakref__",
        "_groups",
        "_index",
        "_selections",
        "aliases",
        "devices",
        "dtypes",
        "is_sharded",
        "keys",
        "names",
        "parameters",
        "requires_grad",
        "shapes",
        "wrapper_names",
    )

    def __init__(
        self,
        names: tuple[str, ...],
        aliases: tuple[tuple[str, ...], ...],
        parameters: int,
        shapes: tuple[tuple[int, ...] | None, ...],
        dtypes: tuple[torch.dtype, ...],
        devices: tuple[torch.device, ...],
        requires_grad: tuple[bool, ...],
        wrapper_names: tuple[tuple[str, ...], ...] = (),
        is_sharded: bool = False,
    ) -> None:
        self.names = names
        self.aliases = aliases
        self.parameters = parameters
        self.shapes = shapes
        self.dtypes = dtypes
        self.devices = devices
        self.requires_grad = requires_grad
        self.wrapper_names = wrapper_names
        self.is_sharded = is_sharded
        self._index: dict[str, int] | None = None
        self.keys: dict[Any, Keys] = {}
        self._selections: dict[Any, tuple[Layout, list[int]]] = {}
        self._groups: dict[int, tuple[Layout, list[list[int]]]] = {}

    @classmethod
    def of(
        cls,
        source: Any,
        names: tuple[str, ...],
        aliases: tuple[tuple[str, ...], ...],
        parameters: int,
        tensors: Sequence[Any],
    ) -> Layout:
        """Return the layout of `tensors`, whose names in `source` are known.

        Raises ValueError where two tensors have the same name.
        """
        *known, sharded = describe(source, tensors)
        if is_without_wrappers(names, aliases):  # a layout of these names was checked before
            layout = _layouts.get((names, aliases, parameters, *known, (), sharded))
            if layout is not None:
                return layout
        check_distinct(names, aliases)
        names, aliases, wrapper_names = without_wrappers(source, names, aliases)
        layout = cls.shared(names, aliases, parameters, *known, wrapper_names, sharded)
        if len(layout) <= _MAX_RECENT and layout not in _recent:
            _recent.append(layout)
        return layout

    @classmethod
    def shared(cls, *fields: Any) -> Layout:
        """Return a layout with these fields; equal layouts share one object while any is in use.

        A mapping has a new layout at every call. Histories would otherwise keep all of them.
        """
        layout = cls(*fields)
        return _layouts.setdefault(layout.fields, layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout.shared, self.fields

    @property
    def fields(self) -> tuple[Any, ...]:
        """All fields that define equality of layouts, as a hashable tuple."""
        return (
            self.names,
            self.aliases,
            self.parameters,
            self.shapes,
            self.dtypes,
            self.devices,
            self.requires_grad,
            self.wrapper_names,
            self.is_sharded,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def index(self) -> dict[str, int]:
        """The row of every name, aliases and names under wrappers included."""
        if self._index is None:
            index = {name: i for i, names in enumerate(self.wrapper_names) for name in names}
            index.update({alias: i for i, names in enumerate(self.aliases) for alias in names})
            index.update({name: i for i, name in enumerate(self.names)})
            self._index = index
        return self._index

    def row(self, row: int) -> tuple[Any, ...]:
        """Return everything that is known about a tensor, for comparisons."""
        return (
            self.names[row],
            self.aliases[row],
            self.shapes[row],
            self.dtypes[row],
            self.devices[row],
            self.requires_grad[row],
        )

    def row_name(self, row: int) -> str:
        """Return the name of a row of the table, in which gradients follow the tensors."""
        n = len(self.names)
        return self.names[row] if row < n else f"{self.names[row - n]} (gradient)"

    def kind(self, row: int) -> str:
        """Return "param" or "buffer"."""
        return "param" if row < self.parameters else "buffer"

    def make_keys(
        self, template: str, stats: tuple[str, ...], columns: bytes, totals: bool
    ) -> Keys:
        """Return the logger keys of all tensors and gradients and, if asked, of the total.

        They are cached in `keys`, by `(template, stats, totals)`.
        """
        cached = self.keys.get((template, stats, totals))
        if cached is not None:
            return cached

        def some(kind: str, name: str) -> list[str]:
            return [template.format(kind=kind, stat=stat, name=name) for stat in stats]

        names = [k for row, name in enumerate(self.names) for k in some(self.kind(row), name)]
        names += [k for name in self.names for k in some("grad", name)]
        if totals:
            names += some("param", "total") + some("grad", "total")
        keys = Keys(names, dict.fromkeys(names), columns)
        _remember(self.keys, (template, stats, totals), keys)
        return keys

    def names_of(self, row: int) -> list[tuple[str, ...]]:
        """Return the names of a tensor, each as (name,) or (name, full name under wrappers)."""
        names = (self.names[row], *self.aliases[row])
        full_names = self.wrapper_names[row] if self.wrapper_names else ()
        if len(full_names) != len(names):
            return [(name,) for name in names]
        return list(zip(names, full_names, strict=True))

    def select(self, include: Patterns | None, exclude: Patterns) -> tuple[Layout, list[int]]:
        """Return the layout of the selected rows (see `passes`), and these rows."""
        key = (include, exclude)
        selection = self._selections.get(key)
        if selection is None:
            rows = [
                row
                for row in range(len(self))
                if any(passes(forms, include, exclude) for forms in self.names_of(row))
            ]
            selection = (self.take(rows), rows)
            _remember(self._selections, key, selection)
        return selection

    def take(self, rows: Sequence[int]) -> Layout:
        """Return the layout of these rows, which must be in ascending order."""
        return joined([(self, row) for row in rows])

    def by_module(self, depth: int) -> tuple[Layout, list[list[int]]]:
        """Return a layout with one row per module at `depth`, and the rows merged into each.

        A module's path is cut to `depth` parts. Tensors directly in the root module keep their
        name. Shapes are None; dtype and device are those of the module's first tensor.
        """
        grouped = self._groups.get(depth)
        if grouped is None:
            groups: dict[tuple[bool, str, bool], list[int]] = {}
            for row, name in enumerate(self.names):
                path = name.split(".")[:-1]
                group = ".".join(path[:depth]) if path else name
                groups.setdefault((row >= self.parameters, group, not path), []).append(row)
            in_order = sorted(groups, key=lambda group: group[0])  # parameters first
            first = [groups[group][0] for group in in_order]
            layout = Layout(
                tuple(name for _, name, _ in in_order),
                ((),) * len(in_order),
                sum(not is_buffer for is_buffer, *_ in in_order),
                (None,) * len(in_order),
                tuple(self.dtypes[row] for row in first),
                tuple(self.devices[row] for row in first),
                tuple(any(self.requires_grad[row] for row in groups[group]) for group in in_order),
            )
            grouped = (layout, [groups[group] for group in in_order])
            _remember(self._groups, depth, grouped)
        return grouped


def joined(rows: Sequence[tuple[Layout, int]]) -> Layout:
    """Return the layout of rows of several layouts, of which parameters come first."""
    layouts = [layout for layout, _ in rows]
    has_wrappers = any(layout.wrapper_names for layout in layouts)
    return Layout.shared(
        tuple(layout.names[row] for layout, row in rows),
        tuple(layout.aliases[row] for layout, row in rows),
        sum(row < layout.parameters for layout, row in rows),
        tuple(layout.shapes[row] for layout, row in rows),
        tuple(layout.dtypes[row] for layout, row in rows),
        tuple(layout.devices[row] for layout, row in rows),
        tuple(layout.requires_grad[row] for layout, row in rows),
        tuple(layout.wrapper_names[row] if layout.wrapper_names else () for layout, row in rows)
        if has_wrappers
        else (),
        any(layout.is_sharded for layout in layouts),
    )


_layouts: weakref.WeakValueDictionary[tuple[Any, ...], Layout] = weakref.WeakValueDictionary()

_MAX_RECENT = 2000
"""Number of tensors up to which a layout is in `_recent`: its keys may take a hundred times as much
memory as its names."""

_recent: collections.deque[Layout] = collections.deque(maxlen=4)
"""Layouts that keep their caches while no summary uses them, between two calls."""


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _MAX_CACHED:
        cache.clear()
    cache[key] = value
