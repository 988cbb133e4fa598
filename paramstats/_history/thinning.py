"""The entries that a history keeps in memory: evenly spaced over the run, within a bound."""

from __future__ import annotations

import math
import sys

from paramstats._core.layout import Layout
from paramstats._core.moments import ROW
from paramstats._history.lines import Entry
from paramstats._summary import Summary, layout_of

_ENTRY_BYTES = 400
"""What an entry takes beside its table of states: the Summary, the Entry, their numbers."""

_ROW_BYTES = 256
"""What a layout takes for each tensor beside its name and shape: places in seven tuples, an index
by name."""


class Thinned:
    """Entries at every `spacing`-th number from 0, and the latest.

    When they take more than `max_bytes` the spacing is doubled, which drops every second one. So
    they are spaced evenly at any time, without a plan for how long the run will be.
    """

    def __init__(self, max_bytes: int) -> None:
        self.entries: list[Entry] = []
        self.bytes = 0
        self._max_bytes = max_bytes
        self._spacing = 1
        self._uses: dict[Layout, int] = {}

    def add(self, step: int, number: int | None, summary: Summary) -> Entry:
        """Puts an entry in the place of all from its step on; by default its number is the next."""
        entries = self.entries
        replaced: Entry | None = None
        while entries and entries[-1].step >= step:
            replaced = entries.pop()
            self._forget(replaced)
        following = entries[-1].number + 1 if entries else 0
        if number is None:
            number = following
            if entries and replaced is not None:
                number = max(number, _between(entries[-1], replaced, step))
        # Where older versions went back they wrote lower numbers than are left.
        number = max(number, following)
        if entries and entries[-1].number % self._spacing:
            self._forget(entries.pop())  # was there as the latest alone
        entry = Entry(step, number, summary)
        entries.append(entry)
        self._count(summary)
        while self.bytes > self._max_bytes and len(entries) > 2:
            self._spacing *= 2
            self._thin()
        return entry

    def take_spacing(self) -> None:
        """After entries that had been thinned before: goes on at their spacing."""
        self._spacing = math.gcd(*(entry.number for entry in self.entries[:-1])) or self._spacing

    def _thin(self) -> None:
        kept = []
        for entry in self.entries:
            if entry.number % self._spacing == 0 or entry is self.entries[-1]:
                kept.append(entry)
            else:
                self._forget(entry)
        self.entries[:] = kept

    def _count(self, summary: Summary) -> None:
        layout = layout_of(summary)
        if layout not in self._uses:
            self._uses[layout] = 0
            self.bytes += _layout_bytes(layout)
        self._uses[layout] += 1
        self.bytes += _entry_bytes(summary)

    def _forget(self, entry: Entry) -> None:
        layout = layout_of(entry.summary)
        self.bytes -= _entry_bytes(entry.summary)
        self._uses[layout] -= 1
        if self._uses[layout] == 0:
            del self._uses[layout]
            self.bytes -= _layout_bytes(layout)


def _between(before: Entry, after: Entry, step: int) -> int:
    """The number that the entry at `step` had, as near as its neighbours tell: those between them
    may have been thinned out."""
    share = (step - before.step) / (after.step - before.step)
    return before.number + round((after.number - before.number) * share)


def _entry_bytes(summary: Summary) -> int:
    return 2 * len(summary) * ROW.size + _ENTRY_BYTES


def _layout_bytes(layout: Layout) -> int:
    each = (sys.getsizeof(part) for part in (*layout.names, *layout.shapes))
    return sum(each) + _ROW_BYTES * len(layout)
