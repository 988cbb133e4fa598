"""Histories on disk: JSON Lines, a line for each entry, that grow by whole lines.

The first line says what the file is. A line with "names" is a layout; a line with "step" is an
entry, whose rows are those of the last layout above it. docs/history.md has every key.

A line counts once its newline is there. Whatever ends a process, and however much of the last
write reached the disk, what is before the cut is whole; `read` says what is not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import starmap
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from paramstats.layout import Layout
from paramstats.moments import ABSENT, NAN, ROW, Moments, unread
from paramstats.summary import Summary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_VERSION = 1
_HEADER = b'{"paramstats": "history", "version": 1}\n'

_LONGEST_HEADER = 4096
"""So that a foreign file without line ends is not read whole."""

_NONE: Mapping[str, str] = MappingProxyType({})

_COUNTS = Moments._fields[1:5]
_FIGURES = Moments._fields[5:]


class Entry(NamedTuple):
    """`number`: how many entries were appended before it, also where not all of them are left."""

    step: int
    number: int
    summary: Summary


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
        layout = entry.summary._layout
        lines = _entry_line(entry)
        if self._layout is None or self._layout.fields != layout.fields:
            lines = _layout_line(layout) + lines
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
                    self._end_at(number, error, (rest for _, rest in lines))
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
        except (ValueError, TypeError, KeyError):
            version = None
        if version is None:
            raise ValueError(
                f"paramstats.History: expected a file that History wrote, got '{self.path}', "
                f"which begins with {line[:40]!r}"
            )
        if version != _VERSION:
            raise ValueError(
                f"paramstats.History: expected version {_VERSION}, got {version!r} in "
                f"'{self.path}'; a newer paramstats can read it"
            )
        return True

    def _parse(self, line: bytes) -> Layout | Entry:
        if not line.endswith(b"\n"):
            raise ValueError("it has no end")
        content = json.loads(line)
        if "names" in content:
            return _layout(content)
        assert self.layout is not None, "an entry before any layout"
        return _entry(content, self.layout)

    def _end_at(self, number: int, error: Exception, rest: Iterable[bytes]) -> None:
        """What follows a broken line tells a cut, which is no error, from damage, which is one."""
        lost = 1
        for line in rest:
            if _is_whole(line):
                raise ValueError(
                    f"paramstats.History: expected whole lines, got a broken one, line {number} of "
                    f"'{self.path}', with whole ones after it; head -n {number - 1} keeps what is "
                    f"before it"
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
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


# ---- lines --------------------------------------------------------------------------------------


def _layout_line(layout: Layout) -> bytes:
    content = {
        "names": layout.names,
        "aliases": {
            name: aliases
            for name, aliases in zip(layout.names, layout.aliases, strict=True)
            if aliases
        },
        "parameters": layout.parameters,
        "shapes": layout.shapes,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in layout.dtypes],
        "devices": [str(device) for device in layout.devices],
        "requires_grad": layout.requires_grad,
    }
    return json.dumps(content).encode() + b"\n"


def _layout(content: dict[str, Any]) -> Layout:
    names = tuple(content["names"])
    layout = Layout(
        names,
        tuple(tuple(content["aliases"].get(name, ())) for name in names),
        content["parameters"],
        tuple(None if shape is None else tuple(shape) for shape in content["shapes"]),
        tuple(getattr(torch, dtype) for dtype in content["dtypes"]),
        tuple(torch.device(device) for device in content["devices"]),
        tuple(content["requires_grad"]),
    )
    rows = (layout.shapes, layout.dtypes, layout.devices, layout.requires_grad)
    assert all(len(column) == len(names) for column in rows), "columns of several lengths"
    return layout


def _entry_line(entry: Entry) -> bytes:
    summary = entry.summary.wait()
    head: dict[str, Any] = {
        "step": entry.step,
        "number": entry.number,
        "correction": summary._correction,
        "grad_scale": summary._grad_scale,
    }
    if summary._skipped:
        head["skipped"] = dict(summary._skipped)
    if summary._diverged:
        head["diverged"] = dict(summary._diverged)
    if summary._local:
        head["is_local"] = True
    rows = list(ROW.iter_unpack(summary._table))
    n = len(summary)
    columns = {"params": _columns(rows[:n], _numels(summary._layout))}
    if any(row[0] != ABSENT for row in rows[n:]):
        columns["grads"] = _columns(rows[n:], [row[0] for row in rows[:n]])
    figures = json.dumps(columns, separators=(",", ":"))  # no strings but keys: safe to replace in
    figures = figures.replace("NaN", "null").replace("Infinity", "1e999")
    return f"{json.dumps(head)[:-1]}, {figures[1:]}\n".encode()


def _columns(rows: list[tuple[Any, ...]], counts: list[int]) -> dict[str, tuple[Any, ...]]:
    """Without the counts that say nothing: `counts` as expected, all others zero."""
    columns = dict(zip(Moments._fields, zip(*rows, strict=True), strict=False))
    usual = {"count": counts, **{name: [0] * len(rows) for name in _COUNTS}}
    return {name: column for name, column in columns.items() if list(column) != usual.get(name)}


def _entry(content: dict[str, Any], layout: Layout) -> Entry:
    params = _states(content["params"], _numels(layout))
    if "grads" in content:
        grads = _states(content["grads"], [state.count for state in params])
    else:
        grads = [unread(ABSENT)] * len(params)
    summary = Summary(
        layout,
        b"".join(starmap(ROW.pack, params + grads)),
        content["correction"],
        content["grad_scale"],
        (),
        content.get("skipped", _NONE),
        content.get("diverged", _NONE),
        content.get("is_local", False),
    )
    return Entry(content["step"], content["number"], summary)


def _states(columns: dict[str, list[Any]], counts: list[int]) -> list[Moments]:
    n = len(counts)
    found = [columns.get("count", counts)]
    found += [columns.get(name, [0] * n) for name in _COUNTS]
    found += [[NAN if x is None else x for x in columns.get(name, ())] for name in _FIGURES]
    assert n == 0 or all(len(column) == n for column in found), "columns of several lengths"
    return list(starmap(Moments, zip(*found, strict=True)))


def _numels(layout: Layout) -> list[int]:
    return [0 if shape is None else math.prod(shape) for shape in layout.shapes]
