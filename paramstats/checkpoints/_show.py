"""Run `paramstats show`: print the statistics of a checkpoint, or what changed between two."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from paramstats import _display as display
from paramstats._core.format import one_line_name
from paramstats._core.options import STATS, did_you_mean
from paramstats._summary import record_of
from paramstats.checkpoints._compare_files import compare_files
from paramstats.checkpoints._comparison import Change, list_uncompared, make_table, sort_changes
from paramstats.checkpoints._reading import Progress
from paramstats.checkpoints._summarize_file import summarize_file

_CHANGE_STATS = tuple(
    field for field in Change._fields if field not in ("name", "shape", "dtype_a", "dtype_b")
)

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells report it."""

BROKEN_PIPE = 141
"""Exit status of a program whose reader closed the pipe, as shells report it."""

_MAX_LINE_LENGTH = 1000


def run(arguments: argparse.Namespace) -> int:
    """Print what the arguments ask for, and return the exit status: 2 after an error."""
    if sys.stdout is None:
        return _fail("paramstats show: expected an open standard output, but it is closed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have any characters
    try:
        if arguments.limit is not None and arguments.limit < 0:
            raise ValueError(f"paramstats show: expected --limit 0 or more, got {arguments.limit}")
        return _write(_summarize(arguments) if arguments.other is None else _compare(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        path = arguments.file if error.filename is None else error.filename
        return _fail(f"paramstats show: cannot read {path}: {error.strerror or error}")
    except (ValueError, RuntimeError, MemoryError, re.error) as error:
        return _fail(str(error) or f"paramstats show: {type(error).__name__}: {arguments.file}")


def _write(text: str) -> int:
    try:
        for line in text.splitlines(keepends=True):  # one write could lose its error
            sys.stdout.write(line)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second error at exit
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        return _fail(f"paramstats show: cannot write to standard output: {error.strerror}")
    return 0


def _summarize(arguments: argparse.Namespace) -> str:
    _check_sort(arguments.sort, STATS)
    with _reporting() as progress:
        summary = summarize_file(
            arguments.file, include=arguments.include, exclude=arguments.exclude, progress=progress
        )
    record = record_of(summary)
    names = display.ordered(record, arguments.sort)[: arguments.limit]
    if arguments.json:
        content = summary.to_dict()
        content["params"] = {name: content["params"][name] for name in names}
        content["skipped"] = dict(summary.skipped)
        return json.dumps(content, indent=1) + "\n"
    if arguments.csv:
        rows = [{"name": name, **summary[name].to_dict()} for name in names]
        return _csv(("name", "shape", "dtype", "aliases", *STATS), rows)
    table = display.table(record, arguments.sort, arguments.limit, "param")
    table.notes = ["", str(table.findings)] if table.findings else []
    return display.for_print(table) + "\n"


def _compare(arguments: argparse.Namespace) -> str:
    a, b, sort, limit = arguments.file, arguments.other, arguments.sort, arguments.limit
    _check_sort(sort, _CHANGE_STATS)
    with _reporting() as progress:
        comparison = compare_files(
            a, b, include=arguments.include, exclude=arguments.exclude, progress=progress
        )
    if sort is not None:
        rows = tuple(sort_changes(comparison.rows, sort))
        comparison = dataclasses.replace(comparison, rows=rows)
    if arguments.json:
        shown = dataclasses.replace(comparison, rows=comparison.rows[:limit])
        return json.dumps(shown.to_dict(), indent=1) + "\n"
    if arguments.csv:
        for line in list_uncompared(comparison):
            _print_error(line)
        return _csv(Change._fields, [row.to_dict() for row in comparison.rows[:limit]])
    return f"a: {a}\nb: {b}\n{display.for_print(make_table(comparison, limit))}\n"


def _check_sort(sort: str | None, stats: Sequence[str]) -> None:
    """Raise ValueError for an unknown --sort, before a file is read."""
    if sort is not None and sort != "name" and sort.removeprefix("-") not in stats:
        raise ValueError(
            f"paramstats show: expected --sort out of name, {', '.join(stats)}, or --sort=-STAT "
            f"for the smallest first, got {sort!r}{did_you_mean(sort)}"
        )


def _csv(fields: Sequence[str], rows: list[dict[str, Any]]) -> str:
    """Return CSV text; a shape is written as 2x3, and several names with spaces between them."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        row["shape"] = "x".join(map(str, row["shape"]))
        row["aliases"] = " ".join(row.get("aliases", ()))
        writer.writerow(row)
    return out.getvalue()


@contextmanager
def _reporting() -> Iterator[Progress | None]:
    """Yield a function that shows progress, or None; print warnings as single lines at the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _progress_bar() as progress:
            yield progress
    for warning in caught:
        _print_error(str(warning.message))


@contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """Yield a function that updates a tqdm bar if stderr is a terminal; None without tqdm."""
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        tqdm = importlib.import_module("tqdm") if is_terminal else None
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield None
        return
    with tqdm.tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _fail(message: str) -> int:
    _print_error(message)
    return 2


def _print_error(message: str) -> None:
    """Print a message on stderr as one line, in the name of this command."""
    message = re.sub(r"^paramstats[\w.]*:", "paramstats show:", message)
    line = one_line_name(" ".join(message.split()))
    if len(line) > _MAX_LINE_LENGTH:
        line = f"{line[:_MAX_LINE_LENGTH]} ..."
    with contextlib.suppress(OSError):  # the exit status still reports the error
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
