"""Open the files of a checkpoint, and notice when one changes while it is read."""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any, cast

from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import CheckpointError, unexpected

_CLOCK_TICK = 0.02
"""Seconds: more than the resolution of the clock that stamps files (1 to 10 ms on Linux)."""

_NONBLOCKING = getattr(os, "O_NONBLOCK", 0)
"""Opens a FIFO without waiting for its writer. Reading a regular file is not affected."""


class Files:
    """The files of one call. Each must stay the same from its first use to the end of the call.

    As a context manager it raises CheckpointError at the end if a file was replaced, written or
    removed. What was read is then a mix of two files, or it does not belong to the other files of
    the checkpoint. An error in between is replaced too, because the change may be its cause.
    """

    def __init__(self) -> None:
        self.budget = Budget()
        """For the data structures of all files together."""
        self._identities: dict[str, tuple[int, ...]] = {}
        self._views: dict[str, Callable[[], BufferedIOBase]] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None or isinstance(error, (CheckpointError, OSError)):
            for path in self._identities:
                self.note(path)

    def note(self, path: str | os.PathLike[str]) -> None:
        """Note which file is at `path`; raise CheckpointError if it is not the one noted before.

        The files of a checkpoint are noted before any of them is opened. What is read is then the
        state of all files at that one moment.
        """
        path = os.fspath(path)
        try:
            self._compare(path, os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            if path in self._identities:
                raise _changed(path) from None
            raise

    def add_view(self, path: str, opener: Callable[[], BufferedIOBase]) -> None:
        """Let `open` call a function for a path: bytes that are in no file as they are needed."""
        self._views[path] = opener

    def open(self, path: str | os.PathLike[str]) -> io.BufferedReader:
        """Open a file for reading; its errors name the path."""
        path = os.fspath(path)
        if path in self._views:
            return cast(io.BufferedReader, self._views[path]())
        self.note(path)
        raw = RawFile(path, opener=_open)
        try:
            self._compare(path, os.fstat(raw.fileno()))
            return io.BufferedReader(raw)
        except BaseException:
            raw.close()
            raise

    def _compare(self, path: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise unexpected("a file", "no regular file", path)
        identity = _identity(status)
        if self._identities.setdefault(path, identity) != identity:
            raise _changed(path)


class RawFile(io.FileIO):
    """An unbuffered file whose reading errors have its name."""

    def readinto(self, buffer: Any) -> int | None:
        """Read bytes into a buffer and return their number."""
        try:
            return super().readinto(buffer)
        except OSError as error:
            error.filename = self.name
            raise


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _NONBLOCKING)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from others, and from itself after a change.

    Two changes within a tick of the clock have the same time stamp. So this waits until the last
    change is older than a tick: then no later change has its time stamp.
    """
    for stamp in (status.st_mtime_ns, status.st_ctime_ns):
        age = (time.time_ns() - stamp) * 1e-9
        if 0 <= age < _CLOCK_TICK:
            time.sleep(_CLOCK_TICK - age)
    return (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )


def _changed(path: str) -> CheckpointError:
    remedy = "read it again when nothing writes to it"
    return unexpected(
        "a file that stays the same", "one that changed while it was read", path, remedy
    )
