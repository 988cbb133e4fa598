"""`python -m paramstats show`: a checkpoint's statistics, or what changed from one to another."""

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

from paramstats import _display as report
from paramstats._core.format import one_line_name
from paramstats._core.options import STATS
from paramstats._summary import record_of
from paramstats.checkpoints._comparing import compare_files
from paramstats.checkpoints._comparison import Change, in_order
from paramstats.checkpoints._opening import explained
from paramstats.checkpoints._summarizing import Progress, summarize_file

_COMPARED = tuple(f for f in Change._fields if f not in ("shape", "dtype_a", "dtype_b"))

INTERRUPTED = 130
"""What shells say of a program that Ctrl-C ended."""

_LONGEST_LINE = 1000

BROKEN_PIPE = 141
"""What they say of one whose reader went away."""


def run(chosen: argparse.Namespace) -> int:
    """Prints what was asked for; returns the exit status: 2 where a file cannot be read."""
    if sys.stdout is None:
        return _complain("paramstats show: expected a standard output, got a closed one")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold anything
    try:
        if chosen.limit is not None and chosen.limit < 0:
            raise ValueError(f"paramstats show: expected --limit 0 or more, got {chosen.limit}")
        text = _compared(chosen) if chosen.other is not None else _summarized(chosen)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return _complain(explained(error, chosen.file))
    except (ValueError, RuntimeError, MemoryError, re.error) as error:
        return _complain(str(error) or f"paramstats show: {type(error).__name__}: {chosen.file}")
    return _write(text)


def _write(text: str) -> int:
    try:
        for line in text.splitlines(keepends=True):  # at once, PYTHONUNBUFFERED would hide errors
            sys.stdout.write(line)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no word at exit either
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        return _complain(f"paramstats show: cannot write to standard output: {error.strerror}")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _summarized(chosen: argparse.Namespace) -> str:
    _check_order(chosen.sort)
    with _progress() as progress, _warnings_in_a_line():
        summary = summarize_file(
            chosen.file, include=chosen.include, exclude=chosen.exclude, progress=progress
        )
    names = report.ordered(record_of(summary), chosen.sort)[: chosen.limit]
    if chosen.json:
        entire = summary.to_dict()
        entire["params"] = {name: entire["params"][name] for name in names}
        entire["skipped"] = dict(summary.skipped)
        return json.dumps(entire, indent=1) + "\n"
    if chosen.csv:
        records = [{"name": name, **summary[name].to_dict()} for name in names]
        return _csv(("name", "shape", "dtype", "aliases", *STATS), records)
    table = report.table(record_of(summary), chosen.sort, chosen.limit, "param")
    table.notes = ["", str(table.findings)] if table.findings else []
    return report.for_print(table) + "\n"


def _compared(chosen: argparse.Namespace) -> str:
    _check_figure(chosen.sort)
    with _progress() as progress, _warnings_in_a_line():
        result = compare_files(
            chosen.file,
            chosen.other,
            include=chosen.include,
            exclude=chosen.exclude,
            progress=progress,
        )
    rows = _sorted(result.rows, chosen.sort)
    entire, result = result.to_dict(), dataclasses.replace(result, rows=tuple(rows))
    shown = rows[: chosen.limit]
    if chosen.json:
        entire["tensors"] = {row.name: entire["tensors"][row.name] for row in shown}
        return json.dumps(entire, indent=1) + "\n"
    if chosen.csv:
        for note in result._notes(dtypes=False):  # what has no row, or no field in it
            print(note, file=sys.stderr)
        return _csv(Change._fields, [row.to_dict() for row in shown])
    return f"a: {chosen.file}\nb: {chosen.other}\n{result.table(limit=chosen.limit)}\n"


def _check_order(sort: str | None) -> None:
    """What is no order is told before the file is read."""
    try:
        order = report.order(sort)
    except ValueError:
        raise _no_order(sort, ("name", *STATS)) from None
    if order is not None and order.of_grad:
        raise _no_order(sort, ("name", *STATS))


def _check_figure(sort: str | None) -> None:
    if sort is not None and sort != "name" and sort.removeprefix("-") not in _COMPARED[1:]:
        raise _no_order(sort, _COMPARED)


def _no_order(sort: str | None, known: Sequence[str]) -> ValueError:
    return ValueError(
        f"paramstats show: expected --sort out of {', '.join(known)}, or --sort=-STAT for the "
        f"smallest first, got {sort!r}"
    )


def _sorted(rows: Sequence[Change], sort: str | None) -> list[Change]:
    """Largest first, or smallest, what is NaN before all; names in their own order."""
    if sort is None:
        return list(rows)
    if sort == "name":
        return sorted(rows, key=lambda row: row.name)
    return in_order(rows, sort.removeprefix("-"), sort.startswith("-"))


def _csv(fields: Sequence[str], records: list[dict[str, Any]]) -> str:
    """Floats with all their digits; a shape as 2x3, several names with spaces between."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(fields)
    for record in records:
        writer.writerow([_field(name, record[name]) for name in fields])
    return out.getvalue()


def _field(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return ("x" if name == "shape" else " ").join(map(str, value))
    return value


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar with bytes and rate on a terminal's stderr, where there is tqdm."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        yield None
        return
    with tqdm.tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """What would be warned of, on stderr without the place in the source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(warning.message, file=sys.stderr)


def _complain(message: str) -> int:
    line = one_line_name(" ".join(message.split()))
    if len(line) > _LONGEST_LINE:
        line = f"{line[:_LONGEST_LINE]} ..."
    with contextlib.suppress(OSError):  # nowhere to say it: the status does
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
    return 2
