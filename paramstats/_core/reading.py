"""Read the states of tensors: the backend first, torch operators for what it defers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from paramstats._core import reference
from paramstats._core.backend import Implementation
from paramstats._core.format import one_line_name
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
) -> Rows:
    """Read the states of `tensors`, and of their gradients into the second half of the table.

    Args:
        backend: the backend that reads.
        tensors: plain tensors; those that the backend defers are read by torch operators.
        params: whether to read the tensors themselves; only their sizes otherwise.
        grads: whether to read `.grad`; the rows are absent otherwise.
        row_name: the name of a row, for errors.

    Returns:
        A table of 2 N rows, the transfers from devices that are still to be written into it (see
        `reference.finished`), and why a row could not be read, by row.

    Raises:
        NotImplementedError: a gradient is sharded and its tensor is not.
        RuntimeError: a stream that would be used is being captured into a CUDA graph, or the
            native backend was forced and cannot read a CUDA tensor.
    """
    table, deferred_rows, transfers = backend.read(tensors, params, grads)
    if not deferred_rows:
        return table, transfers, _NO_REASONS
    return read_deferred(backend, table, deferred_rows, transfers, params, row_name)


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
    """A record that waits for transfers from devices before its table is complete."""

    __slots__ = ("_record", "_transfers")

    def __init__(self, record: Record, transfers: Sequence[reference.Transfer]) -> None:
        self._record = record
        self._transfers = tuple(transfers)

    def record(self) -> Record:
        return self._record

    def ready(self) -> bool:
        return all(transfer.ready() for transfer in self._transfers)

    def result(self) -> Record:
        return self._record._replace(table=reference.finished(self._record.table, self._transfers))


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
