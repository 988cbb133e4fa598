"""Define `Change` and `Comparison`, the result of `compare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from paramstats._core.format import dtype_name, number, one_line_name, percent, shape
from paramstats._display import for_print, in_order, plain
from paramstats._display.table import Line, Table
from paramstats._findings import Findings
from paramstats.checkpoints._compare.pairing import NOT_COMPARED
from paramstats.checkpoints._stored_tensors import Group

_HEADINGS = ["shape", "norm a", "norm b", "|b - a|", "relative", "largest", "changed"]
_HEADING_OF = {
    **{"norm_a": "norm a", "norm_b": "norm b", "change_norm": "|b - a|", "count": "shape"},
    **{"relative_change": "relative", "largest_change": "largest"},
    **{"changed_count": "changed", "changed_fraction": "changed"},
}
"""The heading of the column that shows a field of `Change`, or comes closest to it."""

_MAX_NAMES = 10
"""Names that a table shows of each kind of tensors that were not compared, such as `only_in_a`."""


class Change(NamedTuple):
    """How much a tensor of checkpoint b differs from the tensor of checkpoint a."""

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
    group: Group = "model"
    """What the tensor of a belongs to: "model", "optimizer" or "other"."""

    def to_dict(self) -> dict[str, Any]:
        """Return every field by name, as types that JSON knows."""
        return {
            **self._asdict(),
            "shape": list(self.shape),
            "dtype_a": dtype_name(self.dtype_a),
            "dtype_b": dtype_name(self.dtype_b),
        }


class GroupChange(NamedTuple):
    """How much all tensors of a group differ from those of checkpoint a, taken as one vector."""

    tensors: int
    """Number of tensors that were compared."""
    unchanged: int
    """Number of tensors without an element that differs."""
    count: int  # type: ignore[assignment]  # hides tuple.count
    """Number of elements."""
    changed_count: int
    norm_a: float
    norm_b: float
    change_norm: float
    relative_change: float
    """As that of a tensor: `change_norm` divided by the norm of a's finite elements."""


@dataclass(frozen=True)
class Comparison:
    """What changed between two checkpoints, tensor by tensor, and what could not be compared."""

    rows: tuple[Change, ...]
    """The tensors in both checkpoints: first those of the model, then the others; of each the
    largest relative change first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """The shapes in a and in b of tensors whose shape differs, by name."""
    skipped: Mapping[str, str]
    """Why a tensor in both checkpoints could not be compared, by name."""
    mapped: Mapping[str, str] = field(default_factory=dict)
    """The name in b of a tensor whose names differ, by its name in a."""
    groups: Mapping[Group, GroupChange] = field(default_factory=dict)
    """The change of all tensors of a group together: "model", "optimizer", "other"."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What a reader must know of the elements of a tensor, such as that they are a shard, by name
    and with the side, "a" or "b"."""
    notes: tuple[str, ...] = ()
    """Lines on how names were mapped, and on what could not be read in a or b."""
    reason: str = ""
    """Why `rows` is empty, and what to do; empty if there are rows."""

    def to_dict(self) -> dict[str, Any]:
        """Return `{"tensors": {name: ...}, "only_in_a": [...], ...}`, as types that JSON knows."""
        return {
            "tensors": {row.name: row.to_dict() for row in self.rows},
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "other_shape": {n: [list(a), list(b)] for n, (a, b) in self.other_shape.items()},
            "skipped": dict(self.skipped),
            "mapped": dict(self.mapped),
            "groups": {group: total._asdict() for group, total in self.groups.items()},
            "labels": dict(self.labels),
            "notes": list(self.notes),
            "reason": self.reason,
        }

    def table(self, width: int | None = None, *, limit: int | None = None) -> str:
        """Return an aligned table of the changes, and below it what could not be compared.

        Args:
            width: number of columns to fit in; what all names begin with is shown once, columns are
                left out, and names are shortened. None: the width of the terminal, or no limit
                outside of one.
            limit: show at most so many changes.
        """
        return plain(make_table(self, limit), width)

    def __str__(self) -> str:
        return for_print(make_table(self))


def make_table(
    comparison: Comparison, limit: int | None = None, sort_by: str | None = None
) -> Table:
    """Return the lines of `Comparison.table`; the column that it is sorted by is never left out."""
    lines = []
    for row in comparison.rows[:limit]:
        norms = (row.norm_a, row.norm_b, row.change_norm, row.relative_change, row.largest_change)
        cells = [shape(row.shape), *map(number, norms), percent(row.changed_fraction)]
        lines.append(Line("tensor", 0, one_line_name(row.name), row.name, cells))
    hidden = len(comparison.rows) - len(lines)
    if hidden:
        lines.append(Line("more", 0, f"... and {hidden:,} more", "", [""] * len(_HEADINGS)))
    dtypes = [
        f"{one_line_name(row.name)}: {dtype_name(row.dtype_a)} and {dtype_name(row.dtype_b)}"
        for row in comparison.rows
        if row.dtype_a != row.dtype_b
    ]
    notes = [
        *list_uncompared(comparison),
        *_first("other dtype", dtypes),
        *list_totals(comparison),
    ]
    kept = _HEADING_OF.get((sort_by or "").removeprefix("-"))
    return Table(list(_HEADINGS), lines, Findings(), notes, kept)


def list_uncompared(comparison: Comparison) -> list[str]:
    """Return lines on mapped names, on tensors that have no row, and on why there is no row."""
    c = comparison
    shapes = {name: f"{list(a)} in a, {list(b)} in b" for name, (a, b) in c.other_shape.items()}
    codes = {
        name: why.removeprefix(NOT_COMPARED)
        for name, why in c.skipped.items()
        if why.startswith(NOT_COMPARED)
    }
    unread = {name: why for name, why in c.skipped.items() if name not in codes}
    lines = [
        *c.notes,
        *_first("only in a", map(one_line_name, c.only_in_a)),
        *_first("only in b", map(one_line_name, c.only_in_b)),
    ]
    for begin, texts in (
        ("other shape", shapes),
        ("not compared", codes),
        ("not read", unread),
        ("note", c.labels),
    ):
        pairs = texts.items()
        lines += _first(begin, [f"{one_line_name(n)}: {one_line_name(text)}" for n, text in pairs])
    return [*lines, c.reason] if c.reason else lines


def _first(begin: str, texts: Iterable[str]) -> list[str]:
    """Return a line for each of the first texts, and one for all others."""
    lines = [f"{begin}: {text}" for text in texts]
    hidden = len(lines) - _MAX_NAMES
    return [*lines[:_MAX_NAMES], f"{begin}: ... and {hidden:,} more"] if hidden > 0 else lines


def list_totals(comparison: Comparison) -> list[str]:
    """Return a line for each group, such as "model: 3 of 148 tensors unchanged, ..."."""
    return [
        f"{group}: {total.unchanged:,} of {total.tensors:,} tensors unchanged, "
        f"relative change of all {number(total.relative_change)}"
        for group, total in comparison.groups.items()
    ]


def sort_changes(changes: Iterable[Change], sort_by: str) -> list[Change]:
    """Return the changes sorted by a field, the largest first and NaN before it.

    Args:
        changes: the changes.
        sort_by: a field that is a number; with a leading "-" the smallest is first. "name"; or
            "unchanged": first the tensors that did not change.
    """
    if sort_by == "name":
        return sorted(changes, key=lambda change: change.name)
    stat = sort_by.removeprefix("-")
    if stat == "unchanged":
        is_last = sort_by != stat
        return sorted(changes, key=lambda change: (change.changed_count > 0) != is_last)
    return in_order(changes, lambda change: getattr(change, stat), sort_by.startswith("-"))
