"""Keep a history's entries in memory: evenly spaced over the run, within a bound."""

from __future__ import annotations

import math
import sys

from paramstats._core.layout import Layout
from paramstats._core.moments import ROW
from paramstats._history.json_lines import Entry
from paramstats._summary import Summary, layout_of

_ENTRY_BYTES = 400
"""Size of an entry without its table of states: the Summary, the Entry and their numbers."""

_LAYOUT_ROW_BYTES = 256
"""Size of a tensor in a layout without its name and shape: seven tuple items, an index item."""


class ThinnedEntries:
    """The entries whose number is a multiple of a spacing, and the latest entry.

    The spacing doubles when the entries take more than `max_bytes`, which drops every second one.
    So the entries are evenly spaced at any time, for a run of any length.
    """

    def __init__(self, max_bytes: int) -> None:
        self.entries: list[Entry] = []
        self.bytes = 0
        self._max_bytes = max_bytes
        self._spacing = 1
        self._layouts: set[Layout] = set()

    def add(self, step: int, number: int | None, summary: Summary) -> Entry:
        """Append an entry and return it; drops all entries from `step` on.

        Does not wait for the statistics of `summary`. `number` is None for a new entry.
        """
        entries = self.entries
        replaced: Entry | None = None
        while entries and entries[-1].step >= step:
            replaced = self._pop()
        next_number = entries[-1].number + 1 if entries else 0
        if number is None:
            number = next_number
            if entries and replaced is not None:
                number = _interpolated_number(entries[-1], replaced, step)
        # Files of older versions may have a lower number after the run went back.
        number = max(number, next_number)
        if entries and entries[-1].number % self._spacing:
            self._pop()  # it was kept only as the latest
        entry = Entry(step, number, summary)
        entries.append(entry)
        layout = layout_of(summary)
        self.bytes += _entry_bytes(layout)
        if layout not in self._layouts:
            self._layouts.add(layout)
            self.bytes += _layout_bytes(layout)
        if self.bytes > self._max_bytes:
            self._measure()
        while self.bytes > self._max_bytes and len(entries) > 2:
            self._spacing *= 2
            entries[:-1] = [e for e in entries[:-1] if e.number % self._spacing == 0]
            self._measure()
        return entry

    def adopt_spacing(self) -> None:
        """Set the spacing to that of the present entries, which a file may have held thinned."""
        self._spacing = math.gcd(*(entry.number for entry in self.entries[:-1])) or self._spacing

    def _pop(self) -> Entry:
        """Remove the latest entry; its layout keeps counting until the next `_measure`."""
        entry = self.entries.pop()
        self.bytes -= _entry_bytes(layout_of(entry.summary))
        return entry

    def _measure(self) -> None:
        """Set `bytes` to the size of the entries and of the layouts that they use."""
        layouts = [layout_of(entry.summary) for entry in self.entries]
        self._layouts = set(layouts)
        self.bytes = sum(map(_entry_bytes, layouts)) + sum(map(_layout_bytes, self._layouts))


def _interpolated_number(before: Entry, after: Entry, step: int) -> int:
    """Estimate the number that the entry at `step` had: it may have been dropped from memory."""
    share = (step - before.step) / (after.step - before.step)
    return before.number + round((after.number - before.number) * share)


def _entry_bytes(layout: Layout) -> int:
    return 2 * len(layout) * ROW.size + _ENTRY_BYTES


def _layout_bytes(layout: Layout) -> int:
    sizes = (sys.getsizeof(part) for part in (*layout.names, *layout.shapes))
    return sum(sizes) + _LAYOUT_ROW_BYTES * len(layout)
