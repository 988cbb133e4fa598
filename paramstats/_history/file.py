"""Histories on disk: JSON Lines, a line for each entry, that grow by whole lines.

The first line says what the file is. A line with "names" is a layout; a line with "step" is an
entry, whose rows are those of the last layout above it. docs/history.md has every key.

A line counts once its newline is there. Whatever ends a process, and however much of the last
write reached the disk, what is before the cut is whole; `Reader` says what is not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator

from paramstats._core.layout import Layout
from paramstats._history.lines import Entry, entry_line, entry_of, expect, layout_line, layout_of
from paramstats._summary import record_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_VERSION = 1
_HEADER = b'{"paramstats": "history", "version": 1}\n'

_LONGEST_HEADER = 4096
"""So that a foreign file without line ends is not read whole."""


class TakenError(OSError):
    """Another one has the file open to write."""


class Writer:
    """Appends entries to a file, which is its own from when it is made until it is closed."""

    def __init__(self, path: str) -> None:
        """Opens the file, and makes one where there is none, but changes nothing in it yet."""
        self._layout: Layout | None = None
        self._size = 0
        self._file = open(path, "r+b", buffering=0, opener=_open_or_make)  # noqa: SIM115
        try:
            _lock(self._file.fileno())
        except TakenError:
            self._file.close()
            raise

    def go_on(self, layout: Layout | None, size: int) -> None:
        """After `size` bytes, whose last layout is `layout`; after 0 bytes with the first line."""
        self._layout = layout
        self._size = size
        try:
            self._file.truncate(size)
            self._file.seek(size)
            if size == 0:
                self._write(_HEADER)
        except BaseException:
            self.close()
            raise

    def write(self, entry: Entry) -> None:
        """Appends an entry, after its layout where that has changed: one write, lines that are
        whole or, after an OSError, not there at all."""
        self.check(self._size)
        layout = record_of(entry.summary).layout
        lines = entry_line(entry)
        if self._layout is None or self._layout.fields != layout.fields:
            lines = layout_line(layout) + lines
        self._write(lines)
        self._layout = layout

    def check(self, size: int) -> None:
        """OSError where somebody without the lock, or where there are no locks, has been here."""
        found = os.fstat(self._file.fileno())
        if found.st_size != size:
            raise OSError(f"another has changed it: it has {found.st_size} bytes, not {size}")
        if not found.st_nlink:
            raise OSError("it was removed or replaced")

    def close(self) -> tuple[Layout | None, int]:
        """Returns what it takes to continue the file."""
        if fcntl is not None and not self._file.closed:
            with contextlib.suppress(OSError):  # a copy of the descriptor may outlive this one
                fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)
        self._file.close()
        return self._layout, self._size

    def abandon(self) -> None:
        """In a forked process: the descriptor goes, the lock stays the parent's."""
        self._file.close()

    def _write(self, lines: bytes) -> None:
        # No buffer: what was written survives the process, and a fork has nothing to write again.
        view = memoryview(lines)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(lines)


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _lock(file: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TakenError("another History has it open") from None
    except OSError:  # some network file systems have no locks; `Writer.check` is left
        pass


def write_all(path: str, entries: Iterable[Entry]) -> Writer:
    """Puts a file with these entries at `path`, whole or not at all; returns its writer."""
    beside = f"{path}.{os.getpid()}.tmp"
    writer = Writer(beside)
    try:
        writer.go_on(None, 0)
        for entry in entries:
            writer.write(entry)
        os.fsync(writer._file.fileno())
        os.replace(beside, path)
    except BaseException:
        writer.close()
        if os.path.exists(beside):
            os.remove(beside)
        raise
    return writer


class Reader:
    """Iterates over the entries of a file; afterwards `layout` and `size` are what `Writer.go_on`
    needs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.layout: Layout | None = None
        self.size = 0

    def __iter__(self) -> Iterator[Entry]:
        with open(self.path, "rb") as file:
            first = file.readline(_LONGEST_HEADER)
            if not self._is_header(first):
                return
            self.size = len(first)
            lines = enumerate(file, 2)
            for number, line in lines:
                try:
                    parsed = self._parse(line)
                except Exception as error:  # whatever the bytes of a broken line come to
                    self._end_at(number, line, error, (rest for _, rest in lines))
                    return
                self.size += len(line)
                if isinstance(parsed, Layout):
                    self.layout = parsed
                else:
                    yield parsed

    def _is_header(self, line: bytes) -> bool:
        """False where the file ends before its first line does; ValueError for any other file."""
        if _HEADER.startswith(line) and line != _HEADER:
            if line:
                self._warn(1)
            return False
        try:
            header = json.loads(line)
            version = header["version"] if header["paramstats"] == "history" else None
        except (ValueError, TypeError, KeyError, RecursionError):
            version = None
        if version is None:
            raise ValueError(
                f"paramstats.History: expected a file that History wrote, got '{self.path}', "
                f"which begins with {line[:40]!r}"
            )
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"paramstats.History: expected version {_VERSION}, got {version!r} in "
                f"'{self.path}'; a newer paramstats can read it"
            )
        return True

    def _parse(self, line: bytes) -> Layout | Entry:
        if not line.endswith(b"\n"):
            raise ValueError("it has no end")
        content = json.loads(line)
        expect(type(content) is dict, "an object", content)
        if "names" in content:
            return layout_of(content)
        if self.layout is None:
            raise ValueError("expected a layout before the first entry")
        return entry_of(content, self.layout)

    def _end_at(self, number: int, line: bytes, error: Exception, rest: Iterable[bytes]) -> None:
        """A crash leaves half a line, or one that was never written, and nothing after it; a line
        that is whole and means nothing to us may mean something to its owner, and no cut is due."""
        lost = 0
        for other in itertools.chain([line], rest):
            if _is_whole(other):
                after = " with whole ones after it" if lost else ""
                what = " ".join(str(error).split())[:200]
                reason = f"no {what}" if isinstance(error, KeyError) else what
                raise ValueError(
                    f"paramstats.History: expected whole lines, got a broken one, line {number} of "
                    f"'{self.path}',{after} ({reason or type(error).__name__}); "
                    f"head -n {number - 1} keeps what is before it"
                ) from error
            lost += 1
        self._warn(lost)

    def _warn(self, lost: int) -> None:
        warnings.warn(
            f"paramstats.History: the end of '{self.path}' is broken, as after a crash: {lost} "
            f"{'line' if lost == 1 else 'lines'} lost",
            RuntimeWarning,
            stacklevel=6,
        )


def _is_whole(line: bytes) -> bool:
    """Whether it has an end and is JSON, of whatever content."""
    try:
        json.loads(line)
    except RecursionError:  # too deep for us to tell: not what a crash leaves
        pass
    except ValueError:
        return False
    return line.endswith(b"\n")
