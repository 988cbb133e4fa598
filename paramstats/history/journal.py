"""Between entries as they are appended and the file that takes them: figures on their way."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence

from paramstats.history.file import Entry, Reader, Writer, write_all
from paramstats.layout import Layout


class Journal:
    """Takes entries in order, each when its figures are here, and writes them where there is a
    path."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._writer: Writer | None = None
        self._closed_at: tuple[Layout | None, int] | None = None
        self._waiting: deque[Entry] = deque()

    def open(self) -> Iterator[Entry]:
        """The entries that the file has; when they are all read, it is open to be continued."""
        if self._path is None:
            return
        reader = Reader(self._path)
        if os.path.exists(self._path):
            yield from reader
        self._writer = Writer(self._path, reader.layout, reader.size)

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)
        self.settle()

    def settle(self, wait: bool = False) -> None:
        """Takes figures that are here, which lets go of a transfer's memory, and writes them."""
        while self._waiting and (wait or self._waiting[0].summary.ready()):
            entry = self._waiting.popleft()
            entry.summary.wait()
            self._write(entry)

    def save(self, path: str, entries: Sequence[Entry]) -> None:
        """Puts a file with these entries at `path`, and goes on in it where it is our own."""
        write_all(path, entries)
        if self._writer is not None and path == self._path:
            self._writer.close()
            layout = entries[-1].summary._layout if entries else None
            self._writer = Writer(path, layout, os.path.getsize(path))

    def close(self) -> None:
        """Lets go of the file; the next entry opens it again."""
        if self._writer is not None:
            self._closed_at = self._writer.close()
            self._writer = None

    def _write(self, entry: Entry) -> None:
        try:
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

    def _reopen(self, path: str, layout: Layout | None, size: int) -> None:
        if os.path.getsize(path) != size:
            raise OSError("it is not as it was when it was closed")
        self._writer = Writer(path, layout, size)
        self._closed_at = None
