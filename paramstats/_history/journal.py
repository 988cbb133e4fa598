"""Between entries as they are appended and the file that takes them: statistics on their way."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from paramstats._core.layout import Layout
from paramstats._history.file import Reader, TakenError, Writer, write_all
from paramstats._history.lines import Entry


class Journal:
    """Takes entries in order, each when its statistics are here, and writes them where there is a
    path.

    Whoever calls holds `lock`, so that entries come to the file in the order of the memory. It can
    be taken again by the thread that has it: a signal's handler that closes the history may come in
    the middle of an `append`.
    """

    def __init__(self, path: str | None) -> None:
        self.lock = threading.RLock()
        self._path = path
        self._writer: Writer | None = None
        self._closed_at: tuple[Layout | None, int] | None = None
        self._is_forked = False
        self._waiting: deque[Entry] = deque()
        _journals.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (None,)  # a file has one writer: copies live in memory alone

    def open(self) -> Iterator[Entry]:
        """The entries that the file has; when they are all read, it is open to be continued."""
        if self._path is None:
            return
        try:
            writer = Writer(self._path)  # before it is read: nothing may come in between
        except TakenError:
            warnings.warn(
                f"paramstats.History: another History, maybe in another process, has "
                f"'{self._path}' open: entries appended to this one are in memory alone",
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
        writer.go_on(reader.layout, reader.size)
        self._writer = writer

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)
        self.settle()

    def settle(self, wait: bool = False) -> None:
        """Takes statistics that are here, which lets go of a transfer's memory, and writes them."""
        while self._waiting and (wait or self._waiting[0].summary.ready()):
            entry = self._waiting.popleft()
            entry.summary.wait()
            self._write(entry)

    def save(self, path: str, entries: Sequence[Entry]) -> None:
        """Puts a file with these entries at `path`, and goes on in it where it is our own."""
        writer = write_all(path, entries)
        if path == self._path and self._writer is not None:
            self._writer.close()
            self._writer = writer
            return
        closed_at = writer.close()
        if path == self._path and self._closed_at is not None:
            self._closed_at = closed_at

    def close(self) -> None:
        """Lets go of the file; the next entry opens it again."""
        if self._writer is not None:
            self._closed_at = self._writer.close()
            self._writer = None

    def _write(self, entry: Entry) -> None:
        try:
            if self._is_forked:
                raise OSError("it is written by the process that this one was forked from")
            if self._closed_at is not None and self._path is not None:
                self._reopen(self._path, *self._closed_at)
            if self._writer is not None:
                self._writer.write(entry)
        except OSError as error:  # a full disk is no reason to end a training
            warnings.warn(
                f"paramstats.History: '{self._path}' cannot be written any more, entries from step "
                f"{entry.step} on are in memory alone: {error}",
                RuntimeWarning,
                stacklevel=5,
            )
            self.close()
            self._closed_at = None
            self._is_forked = False

    def _reopen(self, path: str, layout: Layout | None, size: int) -> None:
        os.stat(path)  # one that was removed stays so
        writer = Writer(path)
        try:
            writer.check(size)
        except OSError:
            writer.close()
            raise
        writer.go_on(layout, size)
        self._writer = writer
        self._closed_at = None

    def _in_forked_process(self) -> None:
        """The file stays the parent's, with what is on its way to it; a thread that had the lock is
        not here."""
        self.lock = threading.RLock()
        self._waiting.clear()
        self._closed_at = None
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
            self._is_forked = True


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _forked() -> None:
    for journal in list(_journals):
        journal._in_forked_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
