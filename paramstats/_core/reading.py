"""Read the states of tensors: the backend first, torch operators for what it defers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from paramstats._core import reference, updates
from paramstats._core.backend import Implementation
from paramstats._core.format import one_line_name
from paramstats._core.moments import ROW
from paramstats._core.record import Record
from paramstats._core.shard import refuse_shards
from paramstats._core.torch_private import without_modes

_MAX_WARNED = 1000
"""Maximum number of reasons remembered; a reason may contain a size that differs at every call."""

_warned: set[str] = set()


_NO_REASONS: Mapping[int, str] = MappingProxyType({})

Rows = tuple[bytes, Sequence[reference.Transfer], Mapping[int, str]]
"""A table of states, the transfers that complete it, and why a row could not be read."""


def read_rows(
    backend: Implementation,
    tensors: list[Any],
    params: bool,
    grads: bool,
    row_name: Callable[[int], str],
    of_updates: Sequence[updates.Update] = (),
) -> Rows:
    """Read the states of `tensors`, and of their gradients into the second half of the table.

    Args:
        backend: the backend that reads.
        tensors: plain tensors; those that the backend defers are read by torch operators.
        params: whether to read the tensors themselves; only their sizes otherwise.
        grads: whether to read `.grad`; the rows are absent otherwise.
        row_name: the name of a row, for errors.
        of_updates: updates of these tensors. Each has four more rows, after those of gradients.

    Returns:
        A table of 2 N rows and those of updates, the transfers from devices that are still to be
        written into it (see `reference.finished`), and why a row could not be read, by row.

    Raises:
        NotImplementedError: a gradient is sharded and its tensor is not.
        RuntimeError: a stream that would be used is being captured into a CUDA graph, or the
            native backend was forced and cannot read a CUDA tensor.
    """
    if not of_updates:
        table, deferred_rows, transfers = backend.read(tensors, params, grads)
    else:
        table, deferred_rows, transfers = backend.read(
            tensors, params, grads, updates=tuple(of_updates)
        )
    if not deferred_rows:
        return table, transfers, _NO_REASONS
    n = 2 * len(tensors)
    own = [(row, tensor) for row, tensor in deferred_rows if row < n]
    reasons: Mapping[int, str] = _NO_REASONS
    if own or not of_updates:
        head, tail = table[: n * ROW.size], table[n * ROW.size :]
        head, transfers, reasons = read_deferred(backend, head, own, transfers, params, row_name)
        table = head + tail
    if len(own) < len(deferred_rows):
        indexes = [(row - n) // len(updates.ROWS) for row, _ in deferred_rows if row >= n]
        table, more, failed = updates.fill(table, tensors, of_updates, indexes)
        transfers, reasons = (*transfers, *more), {**reasons, **failed}
    return table, transfers, reasons


def read_deferred(
    backend: Implementation,
    table: bytes,
    deferred_rows: reference.DeferredRows,
    transfers: Sequence[reference.Transfer],
    params: bool,
    row_name: Callable[[int], str],
) -> Rows:
    """Read with torch operators the rows that `backend.read` deferred; see `read_rows`."""
    refuse_shards(deferred_rows, row_name)
    if backend.native is not None:
        with without_modes():
            devices = {tensor.device for _, tensor in deferred_rows}
        backend.explain_cuda(devices)
    table, more, skipped = reference.fill(table, deferred_rows, params)
    return table, (*transfers, *more), skipped


class DeferredRecord:
    """A record that waits for transfers from devices before its table is complete.

    Args:
        record: the record with an incomplete table.
        transfers: write the missing rows.
        table: the table to write them to, if it is not that of the record.
        finish: makes the record from the completed table; default: replaces the record's.
    """

    __slots__ = ("_finish", "_record", "_table", "_transfers")

    def __init__(
        self,
        record: Record,
        transfers: Sequence[reference.Transfer],
        table: bytes | None = None,
        finish: Callable[[bytes], Record] | None = None,
    ) -> None:
        self._record = record
        self._transfers = tuple(transfers)
        self._table = record.table if table is None else table
        self._finish = finish

    def record(self) -> Record:
        return self._record

    def ready(self) -> bool:
        return all(transfer.ready() for transfer in self._transfers)

    def result(self) -> Record:
        table = reference.finished(self._table, self._transfers)
        return self._record._replace(table=table) if self._finish is None else self._finish(table)


def warn_once(skipped: Mapping[str, str], stacklevel: int = 3) -> None:
    """Warn about tensors that could not be read, once per process for each reason.

    Args:
        skipped: the reason by name.
        stacklevel: how many frames above this one the user's code is.
    """
    for name, reason in skipped.items():
        if reason not in _warned and len(_warned) < _MAX_WARNED:
            _warned.add(reason)
            warnings.warn(
                f"paramstats.summarize: {name!r} could not be read, its statistics are NaN: "
                f"{one_line_name(reason)}",
                RuntimeWarning,
                stacklevel=stacklevel,
            )
