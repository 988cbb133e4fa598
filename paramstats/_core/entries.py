"""Decode a record: the properties and all statistics of every tensor, in one pass."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from paramstats._core.moments import STATISTICS_ROW, Statistics
from paramstats._core.record import Record


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


def entries(record: Record) -> list[Entry]:
    """Return an entry per tensor of a record, in its order."""
    layout, n = record.layout, len(record.layout)
    rows = list(map(Statistics._make, STATISTICS_ROW.iter_unpack(record.statistics())))
    columns = (
        layout.names,
        layout.aliases,
        ["param"] * layout.parameters + ["buffer"] * (n - layout.parameters),
        layout.shapes,
        layout.dtypes,
        layout.requires_grad,
        rows[:n],
        (None if math.isnan(row.count) else row for row in rows[n:]),
    )
    return list(map(Entry._make, zip(*columns, strict=True)))


def is_read(statistics: Statistics) -> bool:
    """Return whether the elements were read. Otherwise all statistics but `count` are NaN."""
    return not math.isnan(statistics.norm) or statistics.nan_count > 0
