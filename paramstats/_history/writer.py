"""Write the files of histories: append an entry, or save all entries to a new file.

No file stays open between two calls, so there is nothing to share with a forked process, to lock
for long, or to close in the end.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterable
from io import FileIO
from typing import NamedTuple

from paramstats._core.layout import Layout
from paramstats._history.json_lines import HEADER, Entry, entry_line, layout_line
from paramstats._history.reader import Reader, check_regular
from paramstats._summary import record_of


class ChangedError(Exception):
    """The file must not be written any more: it is not as the writer has left it."""


class _Written(NamedTuple):
    """What the file holds."""

    serial: int
    """The serial of the last entry."""
    size: int
    """The number of valid bytes."""
    layout: Layout | None
    """The layout of the last entry."""


class Writer:
    """Appends entries to a file.

    A call that an exception interrupts can be repeated: the same bytes go to the same place. So can
    a call on a `copy`, which a signal handler makes in the middle of another call.
    """

    def __init__(self, reader: Reader, serial: int) -> None:
        """Continue the file that `reader` has read; `serial` is that of its last entry."""
        self.path = reader.path
        self._identity = _identity(reader.status)
        self._process = os.getpid()
        self._written = _Written(serial, reader.size, reader.layout)
        # Sizes that interrupted calls and calls on copies may have left the file with.
        self._attempts = deque([reader.status.st_size], maxlen=8)
        if reader.size == 0:
            self._write(HEADER, _Written(serial, len(HEADER), None))

    @property
    def serial(self) -> int:
        """The serial of the last entry in the file."""
        return self._written.serial

    def copy(self) -> Writer:
        """Return a writer for a call during another call; this writer does not learn of it."""
        return copy.copy(self)

    def write(self, entry: Entry) -> None:
        """Append an entry, and before it its layout if that has changed.

        Raises:
            OSError: it could not be written, for example because the disk is full.
            ChangedError: something else has changed, removed or replaced the file.
        """
        serial, size, layout = self._written
        if entry.serial > serial:  # otherwise, an interrupted call has written it
            lines, layout = _lines(entry, layout)
            self._write(lines, _Written(entry.serial, size + len(lines), layout))

    def is_file(self, path: str) -> bool:
        """Return whether `path` leads to this writer's file."""
        try:
            return _identity(os.stat(path)) == self._identity
        except FileNotFoundError:
            return False

    def _write(self, lines: bytes, written: _Written) -> None:
        if os.getpid() != self._process:
            raise ChangedError("the parent process writes it; a forked process must not")
        begin = self._written.size
        try:
            with open(self.path, "r+b", buffering=0) as file:
                size = self._checked_size(file)
                if written.size > max(self._attempts, default=0):
                    self._attempts.append(written.size)
                try:
                    file.seek(begin)
                    view = memoryview(lines)
                    while view:
                        view = view[file.write(view) :]
                    if size > written.size:
                        file.truncate(written.size)
                except OSError:
                    with contextlib.suppress(OSError, ValueError):
                        file.truncate(begin)  # so that no line is cut
                        self._attempts.remove(written.size)
                    raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ChangedError("it was removed or replaced") from None
        self._written = written

    def _checked_size(self, file: FileIO) -> int:
        """Lock the file until it is closed, and return its size; raises ChangedError."""
        try:
            # The lock belongs to the process, so that it also holds for a call that interrupts one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems have no locks; the checks remain
            if error.errno in (errno.EAGAIN, errno.EACCES, None):  # None: of a signal handler
                raise
        found = os.fstat(file.fileno())
        if _identity(found) != self._identity:
            raise ChangedError("it was replaced")
        begin = self._written.size
        if not (found.st_size == begin or begin < found.st_size <= max(self._attempts, default=0)):
            raise ChangedError(f"its size was changed from {begin} to {found.st_size} bytes")
        return found.st_size


def create(path: str) -> None:
    """Create an empty file unless there is one."""
    with contextlib.suppress(FileExistsError), open(path, "xb"):
        pass


def save(path: str, entries: Iterable[Entry]) -> None:
    """Write a file with these entries, whole or not at all; a file that exists keeps its mode."""
    mode: int | None = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        check_regular(path, mode)
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(HEADER)
            layout = None
            for entry in entries:
                lines, layout = _lines(entry, layout)
                file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename = path
        raise


def _lines(entry: Entry, last: Layout | None) -> tuple[bytes, Layout]:
    """Return the lines for an entry after one with the layout `last`, and its own layout."""
    layout = record_of(entry.summary).layout
    lines = entry_line(entry)
    if layout is not last and (last is None or layout.fields != last.fields):
        lines = layout_line(layout) + lines
    return lines, layout


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
