"""Write a history's entries to its file as soon as their statistics are available."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from paramstats._history.file import LockedError, Reader, Writer, write_all
from paramstats._history.json_lines import Entry


class Journal:
    """Takes entries in order and writes each one when its statistics are available.

    Callers hold `lock`, so that entries reach the file in the order of `append`. The lock is
    reentrant, because a signal handler may close the history in the middle of an `append`.

    Args:
        path: the file. None: entries are not written.
    """

    def __init__(self, path: str | None) -> None:
        self.lock = threading.RLock()
        self._path = path
        self._writer: Writer | None = None  # None: entries are in memory only
        self._waiting: deque[Entry] = deque()
        _journals.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (None,)  # only one history may write a file

    def open(self) -> Iterator[Entry]:
        """Yield the entries of the file, then get ready to append to it."""
        if self._path is None:
            return
        try:
            writer = Writer(self._path)  # locked before it is read, so that nothing is missed
        except LockedError:
            warnings.warn(
                f"paramstats.History: '{self._path}' is already open in another History, maybe in "
                f"another process: entries appended to this one are kept in memory only",
                RuntimeWarning,
                stacklevel=4,
            )
            yield from Reader(self._path)
            return
        reader = Reader(self._path)
        try:
            yield from reader
        except BaseException:
            writer.close()
            raise
        writer.resume(reader.layout, reader.size)
        self._writer = writer

    def add(self, entry: Entry) -> None:
        """Write the entry, now or when its statistics are available."""
        self._waiting.append(entry)
        self.settle()

    def settle(self, wait: bool = False) -> None:
        """Write the entries whose statistics are available, or wait for all of them.

        This also frees the memory of their transfers from a GPU.
        """
        while self._waiting and (wait or self._waiting[0].summary.ready()):
            entry = self._waiting.popleft()
            entry.summary.wait()
            self._write(entry)

    def save(self, path: str, entries: Sequence[Entry]) -> None:
        """Write these entries to a new file; continue in it if it is this journal's file."""
        writer = write_all(path, entries)
        if path != self._path or self._writer is None:
            writer.close()
            return
        if not self._writer.is_open:
            writer.close()
        self._writer.close()
        self._writer = writer

    def close(self) -> None:
        """Unlock and close the file; the next entry opens it again."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, entry: Entry) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(entry)
        except OSError as error:  # for example a full disk, which must not stop training
            warnings.warn(
                f"paramstats.History: cannot write '{self._path}' any more, entries from step "
                f"{entry.step} on are kept in memory only: {error}",
                RuntimeWarning,
                stacklevel=5,
            )
            self._writer.close()
            self._writer = None

    def after_fork(self) -> None:
        """Leave the file and the waiting entries to the parent process."""
        self.lock = threading.RLock()  # a thread of the parent may have held the other
        self._waiting.clear()
        if self._writer is not None:
            self._writer.abandon()


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for journal in list(_journals):
        journal.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
