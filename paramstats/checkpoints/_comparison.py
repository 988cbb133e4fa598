"""What changed from one checkpoint to another, as the caller holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paramstats._core.format import (
    columns,
    dtype_name,
    elide,
    number,
    one_line_name,
    percent,
    printable,
    shape,
)

_HEADINGS = ("parameter", "shape", "norm a", "norm b", "|b - a|", "relative", "largest", "changed")
_GAP = "  "
_NARROWEST_NAME = 12
_LISTED = 10
"""Names listed of what is in one alone; `only_in_a` and `only_in_b` have all."""


class Change(NamedTuple):
    """How far one tensor of b is from the one of a."""

    name: str
    """In a."""
    shape: tuple[int, ...]
    dtype_a: torch.dtype
    dtype_b: torch.dtype
    count: int  # type: ignore[assignment]  # hides tuple.count
    norm_a: float
    norm_b: float
    change_norm: float
    """L2 norm of b - a."""
    relative_change: float
    """change_norm over the norm of a's finite elements; infinite where that is zero, 0 where
    nothing changed, NaN where an element is NaN in one of the two alone."""
    largest_change: float
    """The largest |b - a| of an element."""
    changed_count: int
    changed_fraction: float
    """Share of the elements that are not the same, 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, of JSON's types."""
        return {
            **self._asdict(),
            "shape": list(self.shape),
            "dtype_a": dtype_name(self.dtype_a),
            "dtype_b": dtype_name(self.dtype_b),
        }


@dataclass(frozen=True)
class Comparison:
    """What changed, tensor by tensor, and what could not be compared."""

    rows: tuple[Change, ...]
    """The largest relative change first."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Shapes in a and in b, by name."""
    skipped: Mapping[str, str]
    """Why a tensor in both could not be read, by name."""
    prefix_a: str = ""
    """What is left out of a's names, so that they are b's."""
    prefix_b: str = ""

    def to_dict(self) -> dict[str, Any]:
        """`{"tensors": {name: ...}, "only_in_a": [...], ...}`, of JSON's types alone."""
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
        """An aligned table of all rows, or `limit` of them, names elided to fit `width` columns (by
        default the terminal's), and under it what is not the same in kind."""
        lines = [list(_HEADINGS), *map(_cells, self.rows[:limit])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        room = columns(width) - sum(w + len(_GAP) for w in widths[1:])
        widths[0] = min(widths[0], max(room, _NARROWEST_NAME))
        head, *body = (_line(line, widths) for line in lines)
        rule = printable("─", "-") * len(head)
        left = len(self.rows) - len(body)
        more = [f"... and {left:,} more"] if left else []
        return "\n".join([head, rule, *body, *more, *self._notes()])

    def __str__(self) -> str:
        return self.table()

    def _notes(self, dtypes: bool = True) -> list[str]:
        """What is not the same in kind, a line for each."""
        notes = [
            f"names of {side} without their '{one_line_name(prefix)}'"
            for side, prefix in (("a", self.prefix_a), ("b", self.prefix_b))
            if prefix
        ]
        for side, names in (("a", self.only_in_a), ("b", self.only_in_b)):
            notes += [f"only in {side}: {one_line_name(name)}" for name in names[:_LISTED]]
            if len(names) > _LISTED:
                notes.append(f"only in {side}: ... and {len(names) - _LISTED:,} more")
        notes += [
            f"other shape: {one_line_name(name)}: {list(a)} in a, {list(b)} in b"
            for name, (a, b) in self.other_shape.items()
        ]
        notes += [
            f"other dtype: {one_line_name(row.name)}: "
            f"{dtype_name(row.dtype_a)} and {dtype_name(row.dtype_b)}"
            for row in self.rows
            if dtypes and row.dtype_a != row.dtype_b
        ]
        return notes + [
            f"not read: {one_line_name(n)}: {reason}" for n, reason in self.skipped.items()
        ]


def _cells(row: Change) -> list[str]:
    statistics = (row.norm_a, row.norm_b, row.change_norm, row.relative_change, row.largest_change)
    return [
        one_line_name(row.name),
        shape(row.shape),
        *map(number, statistics),
        percent(row.changed_fraction),
    ]


def _line(cells: list[str], widths: list[int]) -> str:
    name, sizes, *rest = cells
    padded = [elide(name, widths[0]).ljust(widths[0]), sizes.ljust(widths[1])]
    padded += [cell.rjust(width) for cell, width in zip(rest, widths[2:], strict=True)]
    return _GAP.join(padded)


def in_order(rows: Iterable[Change], stat: str, smallest_first: bool = False) -> list[Change]:
    """By a statistic, the largest first, and NaN before all numbers: it is what to look at."""
    sign = 1 if smallest_first else -1

    def key(row: Change) -> tuple[bool, float]:
        x = getattr(row, stat)
        return (False, 0.0) if math.isnan(x) else (True, sign * x)

    return sorted(rows, key=key)
