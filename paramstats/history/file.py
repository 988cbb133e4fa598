"""Histories on disk: JSON Lines, a line for each entry, that grow by whole lines.

The first line says what the file is. A line with "names" is a layout; a line with "step" is an
entry, whose rows are those of the last layout above it. docs/history.md has every key.

A line counts once its newline is there. Whatever ends a process, and however much of the last
write reached the disk, what is before the cut is whole; `read` says what is not.
"""

from __future__ import annotations

import contextlib
import itertools
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
from paramstats.rendering import dtype_name
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
    """`number`: how many entries of the run are before it, also where not all of them are left;
    after going back, that of the entry whose place it takes."""

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
        _expect(type(content) is dict, "an object", content)
        if "names" in content:
            return _layout(content)
        if self.layout is None:
            raise ValueError("expected a layout before the first entry")
        return _entry(content, self.layout)

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
        "dtypes": list(map(dtype_name, layout.dtypes)),
        "devices": [str(device) for device in layout.devices],
        "requires_grad": layout.requires_grad,
    }
    return json.dumps(content).encode() + b"\n"


def _layout(content: dict[str, Any]) -> Layout:
    names = tuple(_list_of(str, content["names"], "names"))
    _expect(len(set(names)) == len(names), "distinct names", names)
    aliases = content["aliases"]
    _expect(type(aliases) is dict, "aliases by name", aliases)
    for several in aliases.values():
        _list_of(str, several, "aliases")
    parameters = content["parameters"]
    _expect(type(parameters) is int and 0 <= parameters <= len(names), "parameters", parameters)
    n = len(names)
    return Layout(
        names,
        tuple(tuple(aliases.get(name, ())) for name in names),
        parameters,
        tuple(map(_shape, _list_of(object, content["shapes"], "shapes", n))),
        tuple(map(_dtype, _list_of(str, content["dtypes"], "dtypes", n))),
        tuple(map(torch.device, _list_of(str, content["devices"], "devices", n))),
        tuple(_list_of(bool, content["requires_grad"], "requires_grad", n)),
    )


def _shape(shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(_list_of(int, shape, "a shape"))
    _expect(min(sizes, default=0) >= 0, "a shape", shape)
    return sizes


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype of this torch, got {name!r}")
    return dtype


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
    grad_scale = _number(content["grad_scale"], "grad_scale")
    _expect(grad_scale > 0 and math.isfinite(1 / grad_scale), "grad_scale > 0", grad_scale)
    is_local = content.get("is_local", False)
    _expect(type(is_local) is bool, "true or false for is_local", is_local)
    summary = Summary(
        layout,
        b"".join(starmap(ROW.pack, params + grads)),
        _number(content["correction"], "correction"),
        grad_scale,
        (),
        _reasons(content, "skipped"),
        _reasons(content, "diverged"),
        is_local,
    )
    step, number = content["step"], content["number"]
    _expect(type(step) is int and -(1 << 63) <= step < 1 << 63, "a step", step)
    _expect(type(number) is int and 0 <= number < 1 << 63, "a number", number)
    return Entry(step, number, summary)


def _states(columns: Any, counts: list[int]) -> list[Moments]:
    """Of counts that a tensor can have: what is read from them has no checks of its own."""
    _expect(type(columns) is dict, "columns", columns)
    n = len(counts)
    found: list[list[Any]] = [_list_of(int, columns.get("count", counts), "count", n)]
    found += [_list_of(int, columns.get(name, [0] * n), name, n) for name in _COUNTS]
    for name in _FIGURES:
        figures = [NAN if x is None else x for x in _list_of(object, columns.get(name, []), name)]
        _expect(len(figures) == n and set(map(type, figures)) <= {int, float}, name, figures)
        found.append(figures)
    states = list(starmap(Moments, zip(*found, strict=True)))
    for state in states:
        others = state[1:5]
        is_possible = state.count >= ABSENT and min(others) >= 0 and not state.m2 < 0
        _expect(is_possible and sum(others) <= max(state.count, 0), "a tensor's figures", state)
    _expect(sum(state.count for state in states) < 1 << 63, "counts of 64 bits in all", n)
    return states


def _expect(condition: bool, what: str, got: object) -> None:
    # no assert: python -O reads files, too
    if not condition:
        raise ValueError(f"expected {what}, got {repr(got)[:80]}")


def _list_of(kind: type, values: Any, what: str, length: int | None = None) -> list[Any]:
    _expect(type(values) is list and length in (None, len(values)), f"a list for {what}", values)
    _expect(kind is object or set(map(type, values)) <= {kind}, f"{kind.__name__}s, {what}", values)
    return list(values)


def _number(value: Any, what: str) -> float:
    _expect(type(value) in (int, float) and math.isfinite(value), f"a number for {what}", value)
    return float(value)


def _reasons(content: dict[str, Any], key: str) -> Mapping[str, str]:
    reasons = content.get(key, _NONE)
    _expect(reasons is _NONE or type(reasons) is dict, f"{key} by name", reasons)
    _list_of(str, list(reasons.values()), key)
    return dict(reasons) if reasons else _NONE


def _numels(layout: Layout) -> list[int]:
    return [0 if shape is None else math.prod(shape) for shape in layout.shapes]
