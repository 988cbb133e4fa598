"""Keep a history's entries in memory: evenly spaced over the run, within a bound."""

from __future__ import annotations

import math
import sys

from paramstats._core.details import Details
from paramstats._core.layout import Layout
from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._history.json_lines import Entry
from paramstats._summary import Summary, layout_of, record_of

_ENTRY_BYTES = 400
"""Size of an entry without its table of states: the Summary, the Entry and their numbers."""

_DETAIL_BYTES = 160
"""Size of a `Detail` without its bytes: the tuple, and its item in the dictionary of a record."""

_NUMBER_BYTES = 64
"""Size of a hyperparameter: the number, and the name if it was made for one summary."""

_LAYOUT_ROW_BYTES = 256
"""Size of a tensor in a layout without its name and shape: seven tuple items, an index item."""


_NONE = Entry(-1 << 63, -1, Summary(None))
"""Stands before the first entry."""


class ThinnedEntries:
    """The entries whose number is a multiple of a spacing, and the latest entry.

    The spacing doubles when the entries take more than `max_bytes`, which drops every second one.
    So the entries are evenly spaced at any time, for a run of any length.

    All statistics of the entries must be available. A call that an exception interrupts can be
    repeated with the same arguments; the result is then the same as without the interruption.
    """

    def __init__(self, max_bytes: int) -> None:
        self.entries: list[Entry] = []
        self._max_bytes = max_bytes
        self._spacing = 1
        self._layouts: set[Layout] = set()  # those that are counted
        self._measured = (0, 0)  # serial of the last entry that is counted; bytes

    def copy(self) -> ThinnedEntries:
        """Return entries that can be changed independently."""
        twin = ThinnedEntries(self._max_bytes)
        twin.entries = self.entries[:]
        twin._spacing = self._spacing
        return twin  # the next `add` measures

    @property
    def bytes(self) -> int:
        """The size of the entries and of the layouts that they use."""
        return self._measured[1]

    def add(self, step: int, summary: Summary, layout: Layout, number: int | None = None) -> Entry:
        """Append an entry and return it; drops all entries from `step` on.

        `layout` is the summary's. `number` is that in the file; None for a new entry.
        """
        entries = self.entries
        first = len(entries)
        before = entries[-1] if entries else _NONE
        last = before.serial
        if before.summary is summary and before.step == step:
            return before  # an interrupted call has added it
        after = None
        while before.step >= step and first:
            first, after = first - 1, before
            before = entries[first - 1] if first else _NONE
        if number is None and first and after is not None:
            number = _interpolated_number(before, after, step)
        # Files of older versions may have a lower number after the run went back.
        number = before.number + 1 if number is None else max(number, before.number + 1)
        entry = Entry(step, number, summary, last + 1)
        if first and before.number % self._spacing:
            first -= 1  # it was kept only as the latest
        counted, size = self._measured
        for dropped in entries[first:]:
            size -= _entry_bytes(dropped.summary)
        size += _entry_bytes(summary)
        if layout not in self._layouts:
            size += _layout_bytes(layout)
        entries[first:] = [entry]
        if counted != last or size > self._max_bytes:  # `last` may be of an interrupted call
            self._thin()
        else:
            self._measured = (last + 1, size)
            self._layouts.add(layout)
        return entry

    @property
    def last_serial(self) -> int:
        """The serial of the latest entry, 0 without entries."""
        return self.entries[-1].serial if self.entries else 0

    @property
    def last_step(self) -> float:
        """The step of the latest entry, -inf without entries."""
        return self.entries[-1].step if self.entries else -math.inf

    def adopt_spacing(self) -> None:
        """Set the spacing to that of the present entries, which a file may have held thinned."""
        self._spacing = math.gcd(*(entry.number for entry in self.entries[:-1])) or self._spacing

    def _thin(self) -> None:
        """Measure the entries, and double the spacing until they are within the limit."""
        kept, size = self._spaced()
        while size > self._max_bytes and len(kept) > 2:
            self._spacing *= 2
            kept, size = self._spaced()
        self.entries[:] = kept
        self._layouts = {layout_of(entry.summary) for entry in kept}
        self._measured = (kept[-1].serial, size)

    def _spaced(self) -> tuple[list[Entry], int]:
        """Return the entries to keep at the present spacing, and their size."""
        kept = [entry for entry in self.entries[:-1] if entry.number % self._spacing == 0]
        kept.append(self.entries[-1])
        summaries = [entry.summary for entry in kept]
        layouts = set(map(layout_of, summaries))
        return kept, sum(map(_entry_bytes, summaries)) + sum(map(_layout_bytes, layouts))


def _interpolated_number(before: Entry, after: Entry, step: int) -> int:
    """Estimate the number that the entry at `step` had: it may have been dropped from memory."""
    share = (step - before.step) / (after.step - before.step)
    return before.number + round((after.number - before.number) * share)


def _entry_bytes(summary: Summary) -> int:
    record = record_of(summary)
    size = len(record.table) + _ENTRY_BYTES
    if record.details:
        size += _details_bytes(record.details)
    return size if record.optimizer is None else size + _optimizer_bytes(record.optimizer)


def _details_bytes(details: Details) -> int:
    """Return the size of distributions, rows and zero rows."""
    parts = (data for detail in details.values() for data in detail if data is not None)
    return _DETAIL_BYTES * len(details) + sum(map(sys.getsizeof, parts))


def _optimizer_bytes(record: OptimizerRecord) -> int:
    """Return the size of an optimizer's part; the groups of one entry share nothing with others."""
    groups = {id(group): group for group in record.hyperparameters if group is not None}
    of_groups = sum(sys.getsizeof(group) + _NUMBER_BYTES * len(group) for group in groups.values())
    return len(record.table) + 16 * len(record.methods) + of_groups + _ENTRY_BYTES


def _layout_bytes(layout: Layout) -> int:
    sizes = (sys.getsizeof(part) for part in (*layout.names, *layout.shapes))
    return sum(sizes) + _LAYOUT_ROW_BYTES * len(layout)
