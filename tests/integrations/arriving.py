"""Summaries whose statistics are on their way, as a GPU's are, on a CPU."""

from __future__ import annotations

import sys

import pytest

import paramstats
from paramstats._summary import Summary


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
    """What is under way for each summary that a watcher takes from now on; the last is the latest.

    (`watch` itself tries its arguments on a summary.)
    """
    transfers: list[Arriving] = []
    real = paramstats.summarize

    def summarize(*args, **kwargs):
        summary = real(*args, **kwargs)
        transfers.append(Arriving(summary._table))
        nothing = bytes(len(summary._table))
        return Summary(
            summary._layout, nothing, summary._correction, summary._grad_scale, transfers[-1:]
        )

    monkeypatch.setattr(sys.modules["paramstats._watch"], "summarize", summarize)
    return transfers
