"""Summaries on the CPU whose statistics are still on their way, as after a read on a GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import paramstats
from paramstats._core.reading import DeferredRecord
from paramstats._summary import Summary, record_of


class FakeTransfer:
    """A transfer that completes the table of a summary once it is waited for."""

    def __init__(self, table: bytes) -> None:
        self.table, self.is_ready, self.waits = table, False, 0

    def ready(self) -> bool:
        return self.is_ready

    def details(self) -> dict[int, Any]:
        return {}

    def write(self, table: bytearray) -> None:
        self.waits += 1
        table[:] = self.table


def deferred(summary: Summary) -> tuple[Summary, FakeTransfer]:
    """Return a summary that has to wait for the statistics of another, and its transfer."""
    record = record_of(summary)
    transfer = FakeTransfer(record.table)
    unfinished = record._replace(table=bytes(len(record.table)))
    known = record.optimizer
    if known is not None:
        unfinished = unfinished._replace(optimizer=known._replace(table=bytes(len(known.table))))
    arguments = unfinished, [transfer], None, lambda table, _: record._replace(table=table)
    return Summary(None, DeferredRecord(*arguments)), transfer


def defer_summaries_of_watch(monkeypatch: pytest.MonkeyPatch) -> list[FakeTransfer]:
    """Defer every summary that a watcher takes; return the list of their transfers."""
    transfers: list[FakeTransfer] = []
    summarize = paramstats.summarize

    def deferring(*args, **kwargs):
        summary, transfer = deferred(summarize(*args, **kwargs))
        transfers.append(transfer)
        return summary

    for module in ("paramstats._watcher", "paramstats._optimizer_hooks"):
        monkeypatch.setattr(sys.modules[module], "summarize", deferring)
    return transfers
