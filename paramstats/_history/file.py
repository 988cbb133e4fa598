"""Read and write the files of histories: JSON Lines, one line per entry, written whole.

The first line identifies the file. A line with "names" is a layout. A line with "step" is an entry;
its rows are those of the last layout above it. docs/history.md lists every key.

A line is valid once its newline is written. When a process is killed, or a disk loses the last
write, all lines before the cut stay valid, and `Reader` warns about the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator

from paramstats._core.layout import Layout
from paramstats._history import json_lines
from paramstats._history.json_lines import Entry
from paramstats._summary import record_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HEADER = b'{"paramstats": "history", "version": 1}\n'

_MAX_HEADER_BYTES = 4096
"""Limit, because a file of another kind may have no newline."""


class LockedError(OSError):
    """Another `History` has the file open for writing."""


class Writer:
    """Appends entries to a file, and locks the file while it is open.

    `resume` must come before the first `write`. A `write` after `close` opens the file again.
    """

    def __init__(self, path: str) -> None:
        """Open and lock a file, or create an empty one; changes nothing in an existing file.

        Raises LockedError if another `History` has it open.
        """
        self._path = path
        self._layout: Layout | None = None
        self._size = 0
        self._is_abandoned = False
        self._open()

    def resume(self, layout: Layout | None, size: int) -> None:
        """Cut the file to `size` bytes; `layout` is the last one in them. 0 bytes: a new file."""
        self._layout = layout
        self._size = size
        try:
            self._file.truncate(size)
            if size == 0:
                self._write(_HEADER)
        except BaseException:
            self.close()
            raise

    def write(self, entry: Entry) -> None:
        """Append an entry, and before it its layout if that has changed.

        Raises OSError and writes nothing if the disk is full, or if something else has changed,
        removed or replaced the file.
        """
        if self._is_abandoned:
            raise OSError("the parent process writes it; a forked process must not")
        if self._file.closed:
            os.stat(self._path)  # raises if the file was removed; `_open` would create it
            self._open()
        self._check_unchanged()
        layout = record_of(entry.summary).layout
        lines = json_lines.entry_line(entry)
        if self._layout is None or self._layout.fields != layout.fields:
            lines = json_lines.layout_line(layout) + lines
        self._write(lines)
        self._layout = layout

    def close(self) -> None:
        """Unlock and close the file."""
        if fcntl is not None and not self._file.closed:
            with contextlib.suppress(OSError):  # a forked process may still have the descriptor
                fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)
        self._file.close()

    def abandon(self) -> None:
        """Close the file in a forked process, and leave the lock to the parent."""
        self._file.close()
        self._is_abandoned = True

    @property
    def is_open(self) -> bool:
        return not self._file.closed

    def _open(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        try:
            _lock(self._file.fileno())
        except LockedError:
            self._file.close()
            raise

    def _check_unchanged(self) -> None:
        """Raise OSError if something without the lock has changed the file."""
        found = os.fstat(self._file.fileno())
        if found.st_size != self._size:
            raise OSError(f"its size was changed from {self._size} to {found.st_size} bytes")
        if not found.st_nlink:
            raise OSError("it was removed or replaced")

    def _write(self, lines: bytes) -> None:
        # Unbuffered: written lines survive the process, and a fork cannot write them again.
        view = memoryview(lines)
        try:
            while view:
                view = view[self._file.write(view) :]
        except BaseException:
            self._file.truncate(self._size)
            raise
        self._size += len(lines)


def _lock(file: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError("another History has it open") from None
    except OSError:  # some network file systems have no locks; `_check_unchanged` remains
        pass


def write_all(path: str, entries: Iterable[Entry]) -> Writer:
    """Write a file with these entries at `path`, whole or not at all; return its writer."""
    temporary = f"{path}.{os.getpid()}.tmp"
    writer = Writer(temporary)
    try:
        writer.resume(None, 0)
        for entry in entries:
            writer.write(entry)
        os.fsync(writer._file.fileno())
        os.replace(temporary, path)
        writer._path = path
    except BaseException:
        writer.close()
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    return writer


class Reader:
    """Iterates over the entries of a file.

    Afterwards `layout` is the last layout, and `size` the number of valid bytes: the arguments of
    `Writer.resume`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.layout: Layout | None = None
        self.size = 0

    def __iter__(self) -> Iterator[Entry]:
        with open(self.path, "rb") as file:
            first = file.readline(_MAX_HEADER_BYTES)
            if not self._is_header(first):
                return
            self.size = len(first)
            lines = enumerate(file, 2)
            for number, line in lines:
                try:
                    parsed = self._parse(line)
                except Exception as error:  # a broken line may raise anything
                    self._stop(number, line, error, (rest for _, rest in lines))
                    return
                self.size += len(line)
                if isinstance(parsed, Layout):
                    self.layout = parsed
                else:
                    yield parsed

    def _is_header(self, line: bytes) -> bool:
        """Return False if the file ends within its first line; raise ValueError for other files."""
        if _HEADER.startswith(line) and line != _HEADER:
            if line:
                self._warn(1)
            return False
        try:
            is_history = json.loads(line) == json.loads(_HEADER)
        except (ValueError, RecursionError):
            is_history = False
        if not is_history:
            raise ValueError(
                f"paramstats.History: expected a file that History wrote, of version 1, got "
                f"'{self.path}', which begins with {line[:60]!r}"
            )
        return True

    def _parse(self, line: bytes) -> Layout | Entry:
        if not line.endswith(b"\n"):
            raise ValueError("no newline")
        content = json.loads(line)
        json_lines.expect(type(content) is dict, "an object", content)
        if "names" in content:
            return json_lines.parse_layout(content)
        if self.layout is None:
            raise ValueError("expected a layout before the first entry")
        return json_lines.parse_entry(content, self.layout)

    def _stop(self, number: int, line: bytes, error: Exception, rest: Iterable[bytes]) -> None:
        """Warn if a crash can explain the broken line `number`; raise ValueError otherwise.

        A crash leaves a line that is cut or unwritten, and nothing valid after it. Any other line
        may matter to the user, so the file must not be cut there.
        """
        lost = 0
        for other in itertools.chain([line], rest):
            if _is_whole(other):
                raise ValueError(
                    f"paramstats.History: expected whole lines, got a broken one, line {number} of "
                    f"'{self.path}' ({error!r:.200}); head -n {number - 1} keeps those before it"
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
    """Return whether a line has a newline and is JSON, with any content."""
    try:
        json.loads(line)
    except RecursionError:  # nested too deeply to parse; a crash does not leave such a line
        pass
    except ValueError:
        return False
    return line.endswith(b"\n")
