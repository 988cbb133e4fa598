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
    rows = [Statistics._make(row) for row in STATISTICS_ROW.iter_unpack(record.statistics())]
    return [
        Entry(
            layout.names[i],
            layout.aliases[i],
            "param" if i < layout.parameters else "buffer",
            layout.shapes[i],
            layout.dtypes[i],
            layout.requires_grad[i],
            rows[i],
            None if math.isnan(rows[n + i].count) else rows[n + i],
        )
        for i in range(n)
    ]


def is_read(statistics: Statistics) -> bool:
    """Return whether the elements were read. Otherwise all statistics but `count` are NaN."""
    return not math.isnan(statistics.norm) or statistics.nan_count > 0
