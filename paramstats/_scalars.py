"""The keys and values of `Summary.scalars`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from paramstats._core.backend import active
from paramstats._core.derived import derived, derived_names
from paramstats._core.entries import column_kinds, states
from paramstats._core.options import checked_key, checked_stats, duplicate_keys, split_stats
from paramstats._core.record import Record
from paramstats._stats import with_distribution


def scalars(
    full: Record, key: str, stats: Sequence[str], totals: bool, depth: int | None
) -> dict[str, float]:
    """Return `Summary.scalars` of the record `full`; other arguments and errors as there."""
    if depth is not None and (type(depth) is not int or depth < 1):
        raise ValueError(
            f"paramstats.scalars: expected depth to be a whole number of 1 or more, got {depth!r}"
        )
    record = full if depth is None else full.by_module(depth)
    stats, own = split_stats(stats)
    layout = record.layout
    try:
        keys = layout.keys[key, stats, totals]
    except (KeyError, TypeError):  # not cached, or stats is a str or a list
        keys = layout.make_keys(checked_key(key), *checked_stats(stats), bool(totals))
    total = full.merged(0, full.layout.parameters) if totals else b""
    if len(keys.distinct) == len(keys.names) and record.optimizer is None and not own:
        return record.scalars(keys.distinct, keys.columns, total)
    # Equal keys are an error only where both of their values were read.
    by_index = record.scalars(dict.fromkeys(range(len(keys.names))), keys.columns, total)
    pairs = [(keys.names[index], value) for index, value in by_index.items()]
    if record.optimizer is not None:
        for part in (record, full.total()) if totals else (record,):
            pairs += _of_optimizers(part, key, *checked_stats(stats))
    if own:
        for part in (record, full.total()) if totals else (record,):
            pairs += _of_distributions(part, key, own)
    out = dict(pairs)
    if len(out) != len(pairs):
        raise duplicate_keys(key, len(out), len(pairs))
    return out


def _of_distributions(
    record: Record, key: str, stats: tuple[str, ...]
) -> Iterator[tuple[str, float]]:
    """Yield the keys and values of statistics of tensors whose distribution was read."""
    for row, is_grad, tensor in with_distribution(record):
        kind, name = "grad" if is_grad else record.layout.kind(row), record.layout.names[row]
        for stat in stats:
            yield key.format(kind=kind, stat=stat, name=name), getattr(tensor, stat)


def _of_optimizers(
    record: Record, key: str, stats: tuple[str, ...], columns: bytes
) -> Iterator[tuple[str, float]]:
    """Yield the keys and values of updates and of the optimizers' state.

    Args:
        record: a record whose `optimizer` is not None.
        key, stats: as in `Summary.scalars`.
        columns: the positions of `stats` in `Statistics`.
    """
    names = record.layout.names
    indexes: dict[Any, None] = dict.fromkeys(range(len(names) * len(stats)))
    for kind in column_kinds(record):
        if kind in ("param", "grad"):
            continue
        keys, rows = _keys(key, kind, stats, names), states(record, kind)
        values = active().scalars(rows, b"", indexes, columns, record.correction, 1.0)
        yield from ((keys[index], value) for index, value in values.items())
    for name in derived_names(record):
        kind, stat = name.split("_", 1)
        keys = _keys(key, kind, (stat,), names)
        for one, value in zip(keys, derived(record, name), strict=True):
            if value is not None:
                yield one, value


@functools.lru_cache(maxsize=64)
def _keys(key: str, kind: str, stats: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the logger keys of a kind, by name and statistic."""
    return tuple(key.format(kind=kind, stat=stat, name=name) for name in names for stat in stats)
