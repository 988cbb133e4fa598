"""The order of a table's rows: by a statistic or by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from paramstats._core.entries import Entry, entries, is_read, kinds
from paramstats._core.options import STATS, did_you_mean
from paramstats._core.record import Record

T = TypeVar("T")

UPDATE_RATIO = "update_ratio"
"""The heading of `ParamStats.update_ratio`."""


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
    """A statistic, "name" or "update_ratio"."""
    kind: str
    """What the statistic is of; see `Entry.of`."""
    smallest_first: bool

    @property
    def heading(self) -> str | None:
        """The heading of the column that has the values; None for the names."""
        return None if self.stat == "name" else heading(self.stat, self.kind)

    def sorted(self, rows: Iterable[Entry]) -> list[Entry]:
        """Return the entries in this order; those without the statistic come last."""
        if self.stat == "name":
            return sorted(rows, key=lambda entry: entry.name)
        return in_order(rows, self._value, self.smallest_first)

    def _value(self, entry: Entry) -> float | None:
        statistics = entry.of("update" if self.stat == UPDATE_RATIO else self.kind)
        if statistics is None or not is_read(statistics):
            return None
        value: float = getattr(entry if self.stat == UPDATE_RATIO else statistics, self.stat)
        return value


def heading(stat: str, kind: str) -> str:
    """Return the heading of a statistic of a kind, such as "grad.norm"."""
    return stat if kind == "param" else f"{kind}.{stat}"


def order(
    sort_by: str | None, kind: str | None = None, known: Sequence[str] = ("param", "grad", "update")
) -> Order | None:
    """Return what `sort_by` means; None for the order of the model.

    Args:
        sort_by: as in `Summary.table`.
        kind: the kind of the table; None for all.
        known: the kinds that may be named in `sort_by`.

    Raises:
        TypeError: `sort_by` is not a string.
        ValueError: `sort_by` is not "name" or a statistic.
    """
    if sort_by is None:
        return None
    if not isinstance(sort_by, str):
        raise TypeError(f"paramstats.table: expected sort_by to be a str, got {sort_by!r}")
    if sort_by == "name":
        return Order("name", "param", True)
    smallest_first, name = sort_by.startswith("-"), sort_by.removeprefix("-")
    if name == UPDATE_RATIO:
        return Order(name, "param", smallest_first)
    if name in STATS:
        return Order(name, kind if kind in ("grad", "update") else "param", smallest_first)
    for prefix in known:
        stat = name.removeprefix(prefix)[1:]
        if name in (f"{prefix}.{stat}", f"{prefix}_{stat}") and stat in STATS:
            return Order(stat, prefix, smallest_first)
    fronts = " or ".join(f"'{prefix}.'" for prefix in known if prefix != "param")
    stats = ", ".join((*STATS, UPDATE_RATIO))
    raise ValueError(
        f"paramstats.table: expected sort_by to be name or one of {stats}, "
        f"with {fronts} in front of a statistic for what is not the parameter, or '-' for the "
        f"smallest first, got {sort_by!r}"
        f"{did_you_mean(name.rpartition('.')[2].removeprefix('grad_'))}"
    )


def ordered(record: Record, sort_by: str | None) -> list[str]:
    """Return the names of a record's tensors in the order of `Summary.table`."""
    wanted = order(sort_by, known=known_kinds(record))
    if wanted is None:
        return list(record.layout.names)
    return [entry.name for entry in wanted.sorted(entries(record))]


def known_kinds(record: Record) -> tuple[str, ...]:
    """Return the kinds that `sort_by` may name: that of updates even where there are none."""
    return tuple(dict.fromkeys(("param", "grad", "update", *kinds(record))))
