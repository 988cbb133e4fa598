"""Lay out a record as a DataFrame of pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paramstats._core.format import dtype_name
from paramstats._core.optional import import_optional
from paramstats._core.options import STATS
from paramstats._core.record import Record

if TYPE_CHECKING:
    import pandas


def frame(record: Record) -> pandas.DataFrame:
    """Return a row per tensor: its properties, its statistics, and those of its gradient."""
    frames = import_optional("pandas", "to_pandas")
    layout, n = record.layout, len(record.layout)
    values = import_optional("numpy", "to_pandas").frombuffer(record.statistics())
    values = values.reshape(2 * n, len(STATS)).T
    columns: dict[str, Any] = {
        "shape": layout.shapes,
        "dtype": map(dtype_name, layout.dtypes),
        "device": map(str, layout.devices),
        "requires_grad": layout.requires_grad,
        "aliases": map(list, layout.aliases),
        "kind": map(layout.kind, range(n)),
    }
    columns = {name: list(column) for name, column in columns.items()}
    for prefix, half in (("", slice(n)), ("grad_", slice(n, None))):
        for stat, column in zip(STATS, values[:, half], strict=True):
            is_whole = stat.endswith("count") and not (column != column).any()  # NaN: no gradient
            columns[prefix + stat] = column.astype(int) if is_whole else column
    made: pandas.DataFrame = frames.DataFrame(columns, index=layout.names)
    return made.rename_axis("name")
