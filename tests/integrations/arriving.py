"""Summaries whose statistics are on their way, as a GPU's are, on a CPU."""

from __future__ import annotations

import sys

import pytest

import paramstats
from paramstats._core.reading import DeferredRecord
from paramstats._summary import Summary, record_of


class Arriving:
    """The transfer of a summary that is not ready."""

    def __init__(self, table: bytes) -> None:
        self.table, self.is_here, self.is_read = table, False, False

    def ready(self) -> bool:
        return self.is_here

    def write(self, table: bytearray) -> None:
        self.is_read = True
        table[:] = self.table


def have_figures_arrive_late(monkeypatch: pytest.MonkeyPatch) -> list[Arriving]:
    """What is under way for each summary that a watcher takes from now on; the last is the latest."""
    transfers: list[Arriving] = []
    real = paramstats.summarize

    def summarize(*args, **kwargs):
        record = record_of(real(*args, **kwargs))
        transfers.append(Arriving(record.table))
        unfinished = record._replace(table=bytes(len(record.table)))
        return Summary(None, DeferredRecord(unfinished, transfers[-1:]))

    monkeypatch.setattr(sys.modules["paramstats._watch"], "summarize", summarize)
    return transfers
