"""Define `Change` and `Comparison`, the result of `compare_files`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paramstats._core.format import dtype_name, number, one_line_name, percent, shape
from paramstats._display import for_print, in_order, plain
from paramstats._display.table import Line, Table
from paramstats._findings import Findings

_HEADINGS = ["shape", "norm a", "norm b", "|b - a|", "relative", "largest", "changed"]
_MAX_NAMES = 10
"""Names of `only_in_a` and of `only_in_b` that a table shows."""


class Change(NamedTuple):
    """How far a tensor of checkpoint b is from the tensor of the same name in checkpoint a."""

    name: str
    """The name in a."""
    shape: tuple[int, ...]
    dtype_a: torch.dtype
    dtype_b: torch.dtype
    count: int  # type: ignore[assignment]  # hides tuple.count
    """Number of elements."""
    norm_a: float
    norm_b: float
    change_norm: float
    """L2 norm of b - a."""
    relative_change: float
    """change_norm divided by the norm of a's finite elements. It is infinite if that norm is 0, 0
    if nothing changed, and NaN if an element is NaN in only one of the tensors."""
    largest_change: float
    """Largest absolute value of b - a."""
    changed_count: int
    """Number of elements that differ."""
    changed_fraction: float
    """Share of the elements that differ, 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """Return every field by name, as types that JSON knows."""
        return {
            **self._asdict(),
            "shape": list(self.shape),
            "dtype_a": dtype_name(self.dtype_a),
            "dtype_b": dtype_name(self.dtype_b),
        }


@dataclass(frozen=True)
class Comparison:
    """What changed between two checkpoints, tensor by tensor, and what could not be compared."""

    rows: tuple[Change, ...]
    """The tensors in both checkpoints, the largest relative change first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """The shapes in a and in b of tensors whose shape differs, by name."""
    skipped: Mapping[str, str]
    """Why a tensor in both checkpoints could not be read, by name."""
    prefix_a: str = ""
    """The prefix that was removed from the names of a, so that they are the names of b."""
    prefix_b: str = ""
    """The prefix that was removed from the names of b."""

    def to_dict(self) -> dict[str, Any]:
        """Return `{"tensors": {name: ...}, "only_in_a": [...], ...}`, as types that JSON knows."""
        return {
            "tensors": {row.name: row.to_dict() for row in self.rows},
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "other_shape": {n: [list(a), list(b)] for n, (a, b) in self.other_shape.items()},
            "skipped": dict(self.skipped),
            "prefix_a": self.prefix_a,
            "prefix_b": self.prefix_b,
        }

    def table(self, width: int | None = None, *, limit: int | None = None) -> str:
        """Return an aligned table of the changes, and below it what could not be compared.

        Args:
            width: number of columns to fit in; names are elided in the middle. None: the width of
                the terminal, or no limit outside of one.
            limit: show at most so many changes.
        """
        return plain(make_table(self, limit), width)

    def __str__(self) -> str:
        return for_print(make_table(self))


def make_table(comparison: Comparison, limit: int | None = None) -> Table:
    """Return the lines of `Comparison.table`."""
    lines = []
    for row in comparison.rows[:limit]:
        norms = (row.norm_a, row.norm_b, row.change_norm, row.relative_change, row.largest_change)
        cells = [shape(row.shape), *map(number, norms), percent(row.changed_fraction)]
        lines.append(Line("tensor", 0, one_line_name(row.name), row.name, cells))
    hidden = len(comparison.rows) - len(lines)
    if hidden:
        lines.append(Line("more", 0, f"... and {hidden:,} more", "", [""] * len(_HEADINGS)))
    notes = list_uncompared(comparison)
    notes += [
        f"other dtype: {one_line_name(row.name)}: "
        f"{dtype_name(row.dtype_a)} and {dtype_name(row.dtype_b)}"
        for row in comparison.rows
        if row.dtype_a != row.dtype_b
    ]
    return Table(list(_HEADINGS), lines, Findings(), notes, None)


def list_uncompared(comparison: Comparison) -> list[str]:
    """Return a line for each removed prefix and for each tensor that has no row."""
    c = comparison
    lines = [
        f"removed from the names of {side}: '{one_line_name(prefix)}'"
        for side, prefix in (("a", c.prefix_a), ("b", c.prefix_b))
        if prefix
    ]
    for side, names in (("a", c.only_in_a), ("b", c.only_in_b)):
        lines += [f"only in {side}: {one_line_name(name)}" for name in names[:_MAX_NAMES]]
        if len(names) > _MAX_NAMES:
            lines.append(f"only in {side}: ... and {len(names) - _MAX_NAMES:,} more")
    for name, (a, b) in c.other_shape.items():
        lines.append(f"other shape: {one_line_name(name)}: {list(a)} in a, {list(b)} in b")
    for name, reason in c.skipped.items():
        lines.append(f"not read: {one_line_name(name)}: {one_line_name(reason)}")
    return lines


def sort_changes(changes: Iterable[Change], sort_by: str) -> list[Change]:
    """Return the changes sorted by a field, the largest first and NaN before it.

    Args:
        changes: the changes.
        sort_by: a field that is a number; with a leading "-" the smallest is first. Or "name".
    """
    if sort_by == "name":
        return sorted(changes, key=lambda change: change.name)
    field = sort_by.removeprefix("-")
    return in_order(changes, lambda change: getattr(change, field), sort_by.startswith("-"))
