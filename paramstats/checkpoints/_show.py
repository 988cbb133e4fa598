"""Make the text of `paramstats show`: statistics of a checkpoint, or what changed between two."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from paramstats import _display as display
from paramstats._core.format import one_line_name
from paramstats._core.options import STATS, did_you_mean
from paramstats._output import print_error
from paramstats._summary import record_of
from paramstats.checkpoints._compare_files import compare_files
from paramstats.checkpoints._comparison import Change, list_uncompared, make_table, sort_changes
from paramstats.checkpoints._reading import Progress
from paramstats.checkpoints._summarize_file import summarize_file

_COMMAND = "paramstats show"
_CHANGE_STATS = tuple(
    field for field in Change._fields if field not in ("name", "shape", "dtype_a", "dtype_b")
)

_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""Spreadsheets run a cell that begins with one of these; the last four are the wide forms."""


def make_text(arguments: argparse.Namespace) -> str:
    """Return what the arguments ask for."""
    if arguments.limit is not None and arguments.limit < 0:
        raise ValueError(f"paramstats show: expected --limit 0 or more, got {arguments.limit}")
    return _summarize(arguments) if arguments.other is None else _compare(arguments)


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
            print_error(_COMMAND, line)
        return _csv(Change._fields, [row.to_dict() for row in comparison.rows[:limit]])
    table = display.for_print(make_table(comparison, limit))
    return f"a: {one_line_name(a)}\nb: {one_line_name(b)}\n{table}\n"


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
        writer.writerow({field: _cell(value) for field, value in row.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Return a number as it is, and a text so that no spreadsheet or terminal acts on it."""
    if not isinstance(value, str):
        return value
    text = one_line_name(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


@contextmanager
def _reporting() -> Iterator[Progress | None]:
    """Yield a function that shows progress, or None; print warnings as single lines at the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _progress_bar() as progress:
            yield progress
    for warning in caught:
        print_error(_COMMAND, str(warning.message))


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
