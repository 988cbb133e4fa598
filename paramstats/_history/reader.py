"""Read the files of histories: JSON Lines, one line per entry.

The first line identifies the file. A line with "names" is a layout. A line with "step" is an entry;
its rows are those of the last layout above it. docs/history.md lists every key.

A line is valid once its newline is written. When a process is killed, or a disk loses the last
write, all lines before the cut stay valid, and `Reader` warns about the rest.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator

from paramstats._core.denormals import with_denormals
from paramstats._core.layout import Layout
from paramstats._history import json_lines
from paramstats._history.json_lines import HEADER, Entry
from paramstats._history.state_columns import expect

_MAX_HEADER_BYTES = 4096
"""Limit, because a file of another kind may have no newline."""


def check_regular(path: str, mode: int) -> None:
    """Raise ValueError for devices, pipes and folders: reading or replacing them does harm."""
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"paramstats.History: expected a regular file, got {path!r}, which is a folder, a "
            f"device, a pipe or a socket; pass another path"
        )


class Reader:
    """A file that is open for reading; iterates over its entries.

    Afterwards `layout` is the last layout, and `size` the number of valid bytes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.layout: Layout | None = None
        self.size = 0
        self._file = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115
        self.status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(self.status.st_mode):
            self._file.close()
        check_regular(path, self.status.st_mode)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Entry]:
        first = self._file.readline(_MAX_HEADER_BYTES)
        if not self._is_header(first):
            return
        self.size = len(first)
        lines = enumerate(self._file, 2)
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
        if HEADER.startswith(line) and line != HEADER:
            if line:
                self._warn(1)
            return False
        try:
            is_history = json.loads(line) == json.loads(HEADER)
        except (ValueError, RecursionError):
            is_history = False
        if not is_history:
            raise ValueError(
                f"paramstats.History: expected a file that History wrote, of version 1, got "
                f"{self.path!r}, which begins with {line[:60]!r}"
            )
        return True

    @with_denormals
    def _parse(self, line: bytes) -> Layout | Entry:
        if not line.endswith(b"\n"):
            raise ValueError("no newline")
        content = json.loads(line)
        expect(type(content) is dict, "an object", content)
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
                    f"{self.path!r} ({error!r:.200}); head -n {number - 1} keeps those before it"
                ) from error
            lost += 1
        self._warn(lost)

    def _warn(self, lost: int) -> None:
        warnings.warn(
            f"paramstats.History: the end of {self.path!r} is broken, as after a crash: {lost} "
            f"{'line' if lost == 1 else 'lines'} lost",
            RuntimeWarning,
            stacklevel=6,
        )


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait for a writer


def _is_whole(line: bytes) -> bool:
    """Return whether a line has a newline and is JSON, with any content."""
    try:
        json.loads(line)
    except RecursionError:  # nested too deeply to parse; a crash does not leave such a line
        pass
    except ValueError:
        return False
    return line.endswith(b"\n")
