"""The order of a table's rows: by a statistic or by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from paramstats._core.entries import Entry, entries, is_read
from paramstats._core.options import STATS, did_you_mean
from paramstats._core.record import Record

T = TypeVar("T")


def in_order(
    rows: Iterable[T], value: Callable[[T], float | None], smallest_first: bool = False
) -> list[T]:
    """Sort rows by a value, the largest first by default.

    NaN comes before all numbers, because it needs attention. None comes last.
    """

    def key(row: T) -> tuple[int, float]:
        x = value(row)
        if x is None:
            return 2, 0.0
        return (0, 0.0) if math.isnan(x) else (1, x if smallest_first else -x)

    return sorted(rows, key=key)


class Order(NamedTuple):
    """A parsed `sort_by` argument."""

    stat: str
    """A statistic or "name"."""
    of_grad: bool
    smallest_first: bool

    def sorted(self, rows: Iterable[Entry]) -> list[Entry]:
        """Return the entries in this order; those without the statistic come last."""
        if self.stat == "name":
            return sorted(rows, key=lambda entry: entry.name)
        return in_order(rows, self._value, self.smallest_first)

    def _value(self, entry: Entry) -> float | None:
        statistics = entry.grad if self.of_grad else entry.value
        if statistics is None or not is_read(statistics):
            return None
        value: float = getattr(statistics, self.stat)
        return value


def order(sort_by: str | None, kind: str | None = None) -> Order | None:
    """Return what `sort_by` means in a table of this kind; None for the order of the model.

    Raises:
        TypeError: `sort_by` is not a string.
        ValueError: `sort_by` is not "name" or a statistic.
    """
    if sort_by is None:
        return None
    if not isinstance(sort_by, str):
        raise TypeError(f"paramstats.table: expected sort_by to be a str, got {sort_by!r}")
    if sort_by == "name":
        return Order("name", False, True)
    name = sort_by.removeprefix("-").replace("grad.", "grad_")
    stat = name.removeprefix("grad_")
    if stat not in STATS:
        raise ValueError(
            f"paramstats.table: expected sort_by to be name or one of {', '.join(STATS)}, with "
            f"'grad.' in front for the gradient or '-' for the smallest first, got {sort_by!r}"
            f"{did_you_mean(stat)}"
        )
    return Order(stat, kind == "grad" or stat != name, sort_by.startswith("-"))


def ordered(record: Record, sort_by: str | None) -> list[str]:
    """Return the names of a record's tensors in the order of `Summary.table`."""
    wanted = order(sort_by)
    if wanted is None:
        return list(record.layout.names)
    return [entry.name for entry in wanted.sorted(entries(record))]
