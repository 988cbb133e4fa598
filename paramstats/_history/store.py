"""A history's entries in memory and in its file, without threads and signals; see journal.py."""

from __future__ import annotations

import copy
import warnings

from paramstats._history.json_lines import Entry
from paramstats._history.thinning import ThinnedEntries
from paramstats._history.writer import ChangedError, Writer
from paramstats._summary import Summary, record_of

Pending = tuple[int, Summary]
"""A step, and a summary whose statistics may not be available yet."""


class Store:
    """The entries in memory, those that the file still lacks, and the writer of the file.

    A call that an exception interrupts at any moment can be repeated. The result is then the same
    as without the interruption.
    """

    def __init__(self, kept: ThinnedEntries, writer: Writer | None = None) -> None:
        self.kept = kept
        self.writer = writer
        self.messages: list[str] = []  # warnings that have not been shown yet
        self._unwritten: list[Entry] = []
        self._dropped = 0  # entries that neither the file nor memory has
        self._error = ""  # of the last write, if it failed
        self._is_stopped = False

    def copy(self) -> Store:
        """Return a store that can be changed independently, except that both write to one file."""
        twin = copy.copy(self)
        twin.kept = self.kept.copy()
        twin.writer = self.writer and self.writer.copy()
        twin.messages = []
        twin._unwritten = self._unwritten[:]
        return twin

    @property
    def missing(self) -> int:
        """The number of entries that the file lacks."""
        return self._dropped + len(self._unwritten)

    def settle(self, pending: list[Pending]) -> None:
        """Move entries from `pending` to memory and to the file, in order.

        Stops at the first entry whose statistics are not available yet.
        """
        while pending:
            step, summary = pending[0]
            try:
                if not summary.ready():
                    break
                layout = record_of(summary).layout
            except Exception as error:
                if not is_lost(summary):
                    raise  # a signal handler has raised it
                self.messages.append(
                    f"paramstats.History: the entry of step {step} is left out, because its "
                    f"statistics are not available: {error}"
                )
            else:
                entry = self.kept.add(step, summary, layout)
                if self.writer is not None:
                    last = self._unwritten[-1].serial if self._unwritten else self.writer.serial
                    if entry.serial > last:  # otherwise, an interrupted call has added it
                        self._unwritten.append(entry)
            del pending[0]
        if self._unwritten:
            self._write()

    def show_messages(self) -> None:
        """Warn, as if the method of `History` that called the journal's method warned."""
        while self.messages:
            warnings.warn(self.messages.pop(0), RuntimeWarning, stacklevel=5)

    def forget_unwritten(self) -> None:
        """Leave the entries that the file lacks to another process."""
        self._unwritten.clear()

    def _write(self) -> None:
        writer = self.writer
        assert writer is not None
        try:
            while self._unwritten and not self._is_stopped:
                writer.write(self._unwritten[0])
                del self._unwritten[0]
                self._error = ""
        except OSError as error:
            if error.errno is None:  # raised by a signal handler, such as TimeoutError
                raise
            self._note_error(writer, error, "are written when that is possible again")
        except ChangedError as error:
            self._is_stopped = True
            self._note_error(writer, error, "are kept in memory only")
        if self._unwritten and 4 * len(self._unwritten) > 5 * len(self.kept.entries):
            # Keep within the limit of memory, although the file lacks them.
            serials = {entry.serial for entry in self.kept.entries}
            kept = [entry for entry in self._unwritten if entry.serial in serials]
            self._dropped += len(self._unwritten) - len(kept)
            self._unwritten[:] = kept

    def _note_error(self, writer: Writer, error: Exception, future: str) -> None:
        if not self._error or self._is_stopped:  # once for a disk that stays full
            self.messages.append(
                f"paramstats.History: cannot write {writer.path!r}, entries from step "
                f"{self._unwritten[0].step} on {future}: {error}"
            )
        self._error = str(error)


def is_lost(summary: Summary) -> bool:
    """Return whether the statistics will never be available; does not wait for them."""
    try:
        if summary.ready():
            summary.wait()
    except Exception:
        return True
    return False
