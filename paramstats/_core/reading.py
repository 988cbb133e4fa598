"""Read the states of tensors: the backend first, torch operators for what it defers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from paramstats._core import reference, updates
from paramstats._core.backend import Implementation
from paramstats._core.detail_reader import Reason
from paramstats._core.details import NO_DETAILS, Details, named
from paramstats._core.format import one_line_name
from paramstats._core.moments import ROW
from paramstats._core.record import Record
from paramstats._core.shard import refuse_shards
from paramstats._core.torch_private import without_modes
from paramstats._core.transfers import Transfer

_MAX_WARNED = 1000
"""Maximum number of reasons remembered; a reason may contain a size that differs at every call."""

_warned: set[str] = set()


_NO_REASONS: Mapping[Reason, str] = MappingProxyType({})

Rows = tuple[bytes, Sequence[Transfer], Mapping[Reason, str], Details]
"""A table of states, the transfers that complete it, why a row could not be read, and details."""


def read_rows(
    backend: Implementation,
    tensors: list[Any],
    params: bool,
    grads: bool,
    row_name: Callable[[int], str],
    of_updates: Sequence[updates.Update] = (),
    flags: bytes = b"",
) -> Rows:
    """Read the states of `tensors`, and of their gradients into the second half of the table.

    Args:
        backend: the backend that reads.
        tensors: plain tensors; those that the backend defers are read by torch operators.
        params: whether to read the tensors themselves; only their sizes otherwise.
        grads: whether to read `.grad`; the rows are absent otherwise.
        row_name: the name of a row, for errors.
        of_updates: updates of these tensors. Each has four more rows, after those of gradients.
        flags: which details to read: a byte for each tensor, or b"" (see `_core.details`).

    Returns:
        A table of 2 N rows and those of updates, the transfers from devices that are still to be
        written into it (see `finished`), why a row could not be read, by row, and the
        details, by row. Those of transfers are known after them (see `all_details`).

    Raises:
        NotImplementedError: a gradient is sharded and its tensor is not.
        RuntimeError: a stream that would be used is being captured into a CUDA graph, or the
            native backend was forced and cannot read a CUDA tensor.
    """
    table, deferred_rows, transfers, details = backend.read(
        tensors, params, grads, updates=tuple(of_updates), details=flags
    )
    if details:
        details = named(details)
    if not deferred_rows:
        return table, transfers, _NO_REASONS, details
    n = 2 * len(tensors)
    own = [(row, tensor) for row, tensor in deferred_rows if row < n]
    reasons: Mapping[Reason, str] = _NO_REASONS
    if own or not of_updates:
        head, tail = table[: n * ROW.size], table[n * ROW.size :]
        head, transfers, reasons, details = read_deferred(
            backend, head, own, transfers, params, row_name, flags, details
        )
        table = head + tail
    if len(own) < len(deferred_rows):
        indexes = [(row - n) // len(updates.ROWS) for row, _ in deferred_rows if row >= n]
        table, more, failed = updates.fill(table, tensors, of_updates, indexes)
        transfers = (*transfers, *more)
        reasons = dict(itertools.chain(reasons.items(), failed.items()))
    return table, transfers, reasons, details


def read_deferred(
    backend: Implementation,
    table: bytes,
    deferred_rows: reference.DeferredRows,
    transfers: Sequence[Transfer],
    params: bool,
    row_name: Callable[[int], str],
    flags: bytes = b"",
    details: Details = NO_DETAILS,
) -> Rows:
    """Read with torch operators the rows that `backend.read` deferred; see `read_rows`."""
    refuse_shards(deferred_rows, row_name)
    if backend.native is not None:
        with without_modes():
            devices = {tensor.device for _, tensor in deferred_rows}
        backend.explain_cuda(devices)
    table, more, skipped, own = reference.fill(table, deferred_rows, params, flags)
    return table, (*transfers, *more), skipped, {**details, **own} if own else details


def reasons_by_name(
    reasons: Mapping[Reason, str], row_name: Callable[[int], str]
) -> dict[str, str]:
    """Return why something could not be read, by "NAME", "NAME (distribution)" and so on."""
    out = {}
    for key, reason in reasons.items():
        row, what = key if isinstance(key, tuple) else (key, "")
        name = row_name(row)
        if what:
            is_grad = name.endswith(" (gradient)")
            name = f"{name[:-1]}, {what})" if is_grad else f"{name} ({what})"
        out[name] = reason
    return out


class DeferredRecord:
    """A record that waits for transfers from devices before its table is complete.

    Args:
        record: the record with an incomplete table.
        transfers: write the missing rows.
        table: the table to write them to, if it is not that of the record.
        finish: makes the record from the completed table and details; default: replaces those of
            the record.
        details: the details that are known before the transfers, if they are not the record's.
    """

    __slots__ = ("_details", "_finish", "_record", "_table", "_transfers")

    def __init__(
        self,
        record: Record,
        transfers: Sequence[Transfer],
        table: bytes | None = None,
        finish: Callable[[bytes, Details], Record] | None = None,
        details: Details | None = None,
    ) -> None:
        self._record = record
        self._transfers = tuple(transfers)
        self._table = record.table if table is None else table
        self._finish = finish
        self._details = record.details if details is None else details

    def record(self) -> Record:
        return self._record

    def ready(self) -> bool:
        return all(transfer.ready() for transfer in self._transfers)

    def result(self) -> Record:
        table = reference.finished(self._table, self._transfers)
        details = reference.all_details(self._details, self._transfers)
        if self._finish is not None:
            return self._finish(table, details)
        return self._record._replace(table=table, details=details)


def warn_once(skipped: Mapping[str, str], stacklevel: int = 3) -> None:
    """Warn about what could not be read, once per process for each reason.

    Args:
        skipped: the reason by name.
        stacklevel: how many frames above this one the user's code is.
    """
    for name, reason in skipped.items():
        if reason not in _warned and len(_warned) < _MAX_WARNED:
            _warned.add(reason)
            warnings.warn(
                f"paramstats.summarize: {name!r} could not be read, {_outcome(name)}: "
                f"{one_line_name(reason)}",
                RuntimeWarning,
                stacklevel=stacklevel,
            )


def _outcome(name: str) -> str:
    details = ("distribution)", "rows)")
    return "and is None" if name.endswith(details) else "its statistics are NaN"
