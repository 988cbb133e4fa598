"""Lay out a record as a DataFrame of pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paramstats._core.derived import derived, derived_names
from paramstats._core.entries import column_kinds, column_name, statistics
from paramstats._core.format import dtype_name
from paramstats._core.optional import import_optional
from paramstats._core.options import STATS
from paramstats._core.record import Record

if TYPE_CHECKING:
    import pandas


def frame(record: Record) -> pandas.DataFrame:
    """Return a row per tensor: its properties, its statistics, and those of its gradient.

    With an optimizer, also the statistics of its update and of the optimizer's state, and the
    numbers of `derived`.
    """
    frames = import_optional("pandas", "to_pandas")
    numpy = import_optional("numpy", "to_pandas")
    layout, n = record.layout, len(record.layout)
    columns: dict[str, Any] = {
        "shape": layout.shapes,
        "dtype": map(dtype_name, layout.dtypes),
        "device": map(str, layout.devices),
        "requires_grad": layout.requires_grad,
        "aliases": map(list, layout.aliases),
        "kind": map(layout.kind, range(n))
        if record.file is None
        else map(record.file.kind, layout.names),
    }
    columns = {name: list(column) for name, column in columns.items()}
    for kind in column_kinds(record):
        values = numpy.frombuffer(statistics(record, kind)).reshape(n, len(STATS)).T
        for stat, column in zip(STATS, values, strict=True):
            is_whole = stat.endswith("count") and not (column != column).any()  # NaN: missing
            columns.setdefault(column_name(stat, kind), column.astype(int) if is_whole else column)
    for name in derived_names(record):
        columns[name] = numpy.array(derived(record, name), numpy.float64)
    made: pandas.DataFrame = frames.DataFrame(columns, index=layout.names)
    return made.rename_axis("name")
