"""Collect statistics of many tensors at many steps into arrays, for plots and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from paramstats._core.backend import active
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, NAN, ROW, Moments, unread
from paramstats._core.options import STATS
from paramstats._core.record import Record
from paramstats._history.series import Array, TotalSeries, min_update_ratio

Bools = npt.NDArray[np.bool_]

_STATE = np.dtype([(name, "<i8" if i < 5 else "<f8") for i, name in enumerate(Moments._fields)])
"""The dtype of a row of a record's table; see `moments.ROW`."""

_ABSENT_ROW = ROW.pack(*unread(ABSENT))


class Cells(NamedTuple):
    """A statistic of several tensors at several steps."""

    steps: npt.NDArray[np.int64]
    names: Sequence[str]
    stat: str
    """A name in `STATS`, or "min_update_ratio", for which `kind` has no meaning."""
    kind: str
    """Either "grad" for the gradients, or "param" for the tensors themselves."""
    values: Array
    """An array of shape (tensors, steps); NaN for missing and unread tensors."""
    is_nonfinite: Bools
    """Whether each tensor or gradient has NaN or infinite elements at each step."""

    def is_empty(self) -> bool:
        """Return whether there is nothing to draw."""
        return bool(np.isnan(self.values).all()) and not self.is_nonfinite.any()


def collect(
    steps: npt.NDArray[np.int64],
    records: Sequence[Record],
    names: Sequence[str],
    stat: str,
    kind: str,
) -> Cells:
    """Return the statistic `stat` of the tensors `names`, from one record per step; see `Cells`."""
    is_ratio = stat == "min_update_ratio"
    half = 1 if kind == "grad" and not is_ratio else 0
    moments = np.empty((3 if is_ratio else 1, len(names), len(records)))
    is_nonfinite = np.empty((len(names), len(records)), bool)
    for i, (record, states) in enumerate(_selected(records, names)):
        own = states[half]
        is_nonfinite[:, i] = own["nans"] + own["pos_infs"] + own["neg_infs"] > 0
        if is_ratio:
            moments[:, :, i] = own["count"], own["mean"], own["m2"]
        else:
            column = _statistics(states.tobytes(), record)[half, :, STATS.index(stat)]
            moments[0, :, i] = np.where(np.isnan(own["mean"]), NAN, column)
    if is_ratio:
        moments[:, is_nonfinite] = NAN
    values = min_update_ratio(*moments) if is_ratio else moments[0]
    return Cells(steps, names, stat, kind, values, is_nonfinite)


def with_total(cells: Cells, total: TotalSeries) -> Cells:
    """Return the cells with one more row, that of all parameters together."""
    series = total.grad if cells.kind == "grad" else total
    return cells._replace(
        names=[*cells.names, "total"],
        values=np.vstack([cells.values, getattr(series, cells.stat)]),
        is_nonfinite=np.vstack([cells.is_nonfinite, series.nonfinite_count > 0]),
    )


def table_of(records: Sequence[Record], columns: Sequence[int]) -> Array:
    """Return a row per record and tensor: its statistics, then those of its gradient.

    `columns` are positions in `STATS`.
    """
    tables = [_statistics(record.table, record)[:, :, list(columns)] for record in records]
    return np.concatenate([np.empty((0, 2 * len(columns))), *map(np.hstack, map(tuple, tables))])


def _statistics(table: bytes, record: Record) -> Array:
    """Return the statistics of a table of states as (tensors or gradients, rows, statistics)."""
    made = active().finalize_table(table, record.correction, record.grad_scale)
    return np.frombuffer(made).reshape(2, -1, len(STATS))


def _selected(
    records: Sequence[Record], names: Sequence[str]
) -> Iterator[tuple[Record, npt.NDArray[Any]]]:
    """Yield each record and the states of `names` in it, of shape (tensors or gradients, names)."""
    rows: dict[Layout, npt.NDArray[np.int64]] = {}
    for record in records:
        layout, n = record.layout, len(record.layout)
        if layout not in rows:
            found = [layout.index.get(name) for name in names]
            tensors = [2 * n if row is None else row for row in found]
            gradients = [2 * n if row is None else n + row for row in found]
            rows[layout] = np.array([tensors, gradients], dtype=np.int64)
        yield record, np.frombuffer(record.table + _ABSENT_ROW, _STATE)[rows[layout]]
