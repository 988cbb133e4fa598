"""Collect statistics of many tensors at many steps into arrays, for plots and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from paramstats._core.derived import derived, derived_names
from paramstats._core.entries import column_kinds, column_name, finalized, statistics
from paramstats._core.entries import states as rows_of
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT_ROW, NAN, Moments
from paramstats._core.options import DISTRIBUTION_STATS, STATS
from paramstats._core.record import Record
from paramstats._history.series import TotalSeries, min_update_ratio
from paramstats._history.tensor_series import Array, Bools
from paramstats._stats import with_distribution

_STATE = np.dtype([(name, "<i8" if i < 5 else "<f8") for i, name in enumerate(Moments._fields)])
"""The dtype of a row of a record's table; see `moments.ROW`."""


OF_ONE = (*STATS, *DISTRIBUTION_STATS)
"""The statistics of one tensor; the others are of two."""


class Cells(NamedTuple):
    """A statistic of several tensors at several steps."""

    steps: npt.NDArray[np.int64]
    names: Sequence[str]
    stat: str
    """A name in `OF_ONE`; or "min_update_ratio" or a name in `DERIVED`, which ignore `kind`."""
    kind: str
    """What the statistic is of: "grad", "param", "update" or a key of the optimizer's state."""
    values: Array
    """An array of shape (tensors, steps); NaN for missing and unread tensors."""
    is_nonfinite: Bools
    """Whether each tensor of the kind has NaN or infinite elements at each step."""

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
    is_bound = stat == "min_update_ratio"
    if is_bound:
        kind = "param"
    elif stat not in OF_ONE:  # of two tensors: the one whose elements are marked
        kind = "update" if stat.startswith("update") else "grad"
    moments = np.empty((3 if is_bound else 1, len(names), len(records)))
    is_nonfinite = np.empty((len(names), len(records)), bool)
    is_update_known = np.zeros((len(names), len(records)), bool)
    for i, (record, rows) in enumerate(_rows(records, names)):
        own = _selected(record, kind, rows)
        is_nonfinite[:, i] = own["nans"] + own["pos_infs"] + own["neg_infs"] > 0
        if is_bound:
            moments[:, :, i] = own["count"], own["mean"], own["m2"]
            is_update_known[:, i] = ~np.isnan(_selected(record, "update", rows)["mean"])
        elif stat in STATS:
            column = _values(finalized(own.tobytes(), record, kind))[:, STATS.index(stat)]
            moments[0, :, i] = np.where(np.isnan(own["mean"]), NAN, column)
        elif stat in DISTRIBUTION_STATS:
            moments[0, :, i] = np.append(_of_distributions(record, kind, stat), NAN)[rows]
        else:
            moments[0, :, i] = np.array([*derived(record, stat), NAN], np.float64)[rows]
    if is_bound:
        moments[:, is_nonfinite] = NAN
    values = min_update_ratio(*moments) if is_bound else moments[0]
    values[is_update_known] = NAN
    return Cells(steps, names, stat, kind, values, is_nonfinite)


def with_total(cells: Cells, total: TotalSeries) -> Cells:
    """Return the cells with one more row, that of all parameters together."""
    series: Any = total
    if cells.kind in ("grad", "update"):
        series = getattr(total, cells.kind)
    elif cells.kind != "param":
        series = total.optimizer.state[cells.kind]
    stat = cells.stat
    if stat in OF_ONE:
        values = getattr(series, stat)
    elif "_cosine_" in stat:
        values = total.optimizer.cosine(*stat.split("_cosine_"))
    elif stat.startswith("optimizer_"):
        values = getattr(total.optimizer, stat.removeprefix("optimizer_"))
    else:
        values = getattr(total, stat)
    return cells._replace(
        names=[*cells.names, "total"],
        values=np.vstack([cells.values, values]),
        is_nonfinite=np.vstack([cells.is_nonfinite, series.nonfinite_count > 0]),
    )


def columns_of(records: Sequence[Record], stats: Sequence[str]) -> dict[str, Array]:
    """Return columns with a value per record and tensor, by the names of `Summary.to_pandas`."""
    kinds = dict.fromkeys(("param", "grad"))
    kinds |= dict.fromkeys(kind for record in records for kind in column_kinds(record))
    out: dict[str, Array] = {}
    for kind in kinds:
        tables = [_values(statistics(record, kind)) for record in records]
        table = np.concatenate([np.empty((0, len(STATS))), *tables])
        for stat in stats:
            if stat in STATS:
                out.setdefault(column_name(stat, kind), table[:, STATS.index(stat)])
            elif kind in ("param", "grad"):
                columns = [_of_distributions(record, kind, stat) for record in records]
                out[column_name(stat, kind)] = np.concatenate([np.empty(0), *columns])
    for name in dict.fromkeys(name for record in records for name in derived_names(record)):
        out[name] = np.concatenate([np.array(derived(r, name), np.float64) for r in records])
    return out


def _of_distributions(record: Record, kind: str, stat: str) -> Array:
    """Return a statistic of each tensor; NaN where the distribution was not read."""
    out = np.full(len(record.layout), NAN)
    for row, is_grad, stats in with_distribution(record):
        if kind == ("grad" if is_grad else "param"):
            out[row] = getattr(stats, stat)
    return out


def _values(rows: bytes) -> Array:
    """Return float64 rows of statistics as an array of shape (rows, statistics)."""
    return np.frombuffer(rows).reshape(-1, len(STATS))


def _selected(record: Record, kind: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the states of some rows of a kind; the row after the last is absent."""
    return np.frombuffer(rows_of(record, kind) + ABSENT_ROW, _STATE)[rows]


def _rows(
    records: Sequence[Record], names: Sequence[str]
) -> Iterator[tuple[Record, npt.NDArray[np.int64]]]:
    """Yield each record and the rows of `names` in it; the row after the last is a missing one."""
    rows: dict[Layout, npt.NDArray[np.int64]] = {}
    for record in records:
        layout = record.layout
        if layout not in rows:
            found = [layout.index.get(name, len(layout)) for name in names]
            rows[layout] = np.array(found, dtype=np.int64)
        yield record, rows[layout]
