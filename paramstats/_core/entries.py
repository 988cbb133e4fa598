"""Decode a record: the properties and all statistics of every tensor, in one pass.

A record has rows of several kinds: "param" for the tensors themselves, "grad", and with an
optimizer "update" and the keys of its state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

from paramstats._core.backend import active
from paramstats._core.moments import ABSENT_ROW, ROW, STATISTICS_ROW, Statistics
from paramstats._core.record import Record
from paramstats._core.updates import UPDATE, ratio

_NO_STATE: Mapping[str, Statistics] = MappingProxyType({})


class Entry(NamedTuple):
    """The properties and statistics of one tensor, for code that reads all tensors."""

    name: str
    aliases: tuple[str, ...]
    kind: Literal["param", "buffer"]
    shape: tuple[int, ...] | None
    """None for a lazy parameter."""
    dtype: torch.dtype
    requires_grad: bool
    value: Statistics
    """The statistics of the tensor itself."""
    grad: Statistics | None
    """The statistics of its gradient; None if there is no gradient."""
    update: Statistics | None
    """The statistics of its update; None if that is not known."""
    state: Mapping[str, Statistics]
    """The statistics of its optimizer's state, by key."""

    def of(self, kind: str) -> Statistics | None:
        """Return the statistics of a kind; None if there are none."""
        known = {"param": self.value, "grad": self.grad, "update": self.update}
        return known[kind] if kind in known else self.state.get(kind)

    @property
    def update_ratio(self) -> float | None:
        """The norm of the update divided by that of the tensor; None without an update."""
        return None if self.update is None else ratio(self.update.norm, self.value.norm)


def entries(record: Record, with_state: bool = True) -> list[Entry]:
    """Return an entry per tensor of a record, in its order, with or without optimizers' state."""
    layout, n = record.layout, len(record.layout)
    rows = record.statistics()
    params, grads = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    updates: list[Statistics | None] = [None] * n
    states: list[Mapping[str, Statistics]] = [_NO_STATE] * n
    if record.optimizer is not None:
        updates = _decoded(statistics(record, "update"))
        keys = record.optimizer.keys if with_state else ()
        by_key = {key: _decoded(statistics(record, key)) for key in keys}
        of_each = [[(key, row) for row in rows] for key, rows in by_key.items()]
        if of_each:
            states = [
                {key: row for key, row in pairs if row is not None}
                for pairs in zip(*of_each, strict=True)
            ]
    columns = (
        layout.names,
        layout.aliases,
        ["param"] * layout.parameters + ["buffer"] * (n - layout.parameters),
        layout.shapes,
        layout.dtypes,
        layout.requires_grad,
        map(Statistics._make, STATISTICS_ROW.iter_unpack(params)),
        _decoded(grads),
        updates,
        states,
    )
    return list(map(Entry._make, zip(*columns, strict=True)))


def kinds(record: Record) -> tuple[str, ...]:
    """Return the kinds of rows that a record has.

    A key of the state that has the name of another kind is left out.
    """
    optimizer = record.optimizer
    of_optimizer = () if optimizer is None else ("update", *optimizer.keys)
    return tuple(dict.fromkeys(("param", "grad", *of_optimizer)))


def column_kinds(record: Record) -> tuple[str, ...]:
    """Return the kinds that have columns of statistics: all but the number of the step."""
    return tuple(kind for kind in kinds(record) if kind != "step")


def column_name(stat: str, kind: str) -> str:
    """Return the name of the column of a statistic of a kind, such as "grad_norm"."""
    return stat if kind == "param" else f"{kind}_{stat}"


def states(record: Record, kind: str) -> bytes:
    """Return a row of `Moments` for each tensor; absent where there is none of this kind."""
    optimizer, half = record.optimizer, len(record.table) // 2
    if kind in ("param", "grad"):
        return record.table[:half] if kind == "param" else record.table[half:]
    column = None
    if optimizer is not None:
        column = UPDATE if kind == "update" else optimizer.column(kind)
    if optimizer is None or column is None:
        return ABSENT_ROW * len(record.layout)
    begin = optimizer.position(column, 0) * ROW.size
    return optimizer.table[begin : begin + half]


def statistics(record: Record, kind: str) -> bytes:
    """Return a float64 row of all statistics for each tensor; NaN where there are none."""
    return finalized(states(record, kind), record, kind)


def finalized(rows: bytes, record: Record, kind: str) -> bytes:
    """Return the statistics of rows of `Moments` of a kind; see `statistics`."""
    if kind != "grad":
        return active().finalize_table(rows, record.correction, 1.0)
    both = active().finalize_table(rows + rows, record.correction, record.grad_scale)
    return both[len(both) // 2 :]


def _decoded(rows: bytes) -> list[Statistics | None]:
    """Return the statistics in float64 rows; None for an absent row."""
    return [
        None if math.isnan(row[0]) else Statistics._make(row)
        for row in STATISTICS_ROW.iter_unpack(rows)
    ]


def is_read(statistics: Statistics) -> bool:
    """Return whether the elements were read. Otherwise all statistics but `count` are NaN."""
    return not math.isnan(statistics.norm) or statistics.nan_count > 0
