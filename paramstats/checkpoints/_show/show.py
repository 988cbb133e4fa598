"""Make the text of `paramstats show`: statistics of a checkpoint, or what changed between two."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from paramstats import _display as display
from paramstats._core.entries import entries, is_read
from paramstats._core.format import one_line_name
from paramstats._core.options import STATS, did_you_mean
from paramstats._core.record import Record
from paramstats._display.html import MAX_TENSORS
from paramstats._display.table import NO_TENSORS, Table
from paramstats._findings import Findings, Severity
from paramstats._findings.parameters import is_mask
from paramstats._output import ERROR
from paramstats._summary import Summary, record_of
from paramstats.checkpoints._compare.compare import compare_files
from paramstats.checkpoints._compare.comparison import (
    Change,
    Comparison,
    list_uncompared,
    make_table,
    sort_changes,
)
from paramstats.checkpoints._show.csv_text import csv_text
from paramstats.checkpoints._show.page import check_page_path, write_page
from paramstats.checkpoints._show.progress import COMMAND, print_lines, reporting
from paramstats.checkpoints._summarize_file import summarize_file

FOUND = 1
"""Exit status if --fail-on finds something, and if two checkpoints have nothing to compare."""

_FIELDS = ("name", "group", "shape", "dtype", "aliases", *STATS, "label")
_FINDING_FIELDS = ("severity", "code", "name", "message", "advice")
_NOT_SORTED_BY = ("name", "shape", "dtype_a", "dtype_b", "group")
_CHANGE_STATS = tuple(field for field in Change._fields if field not in _NOT_SORTED_BY)
_NOT_READ = "not read"
_DAMAGED = "damaged"
"""What the reason begins with if a tensor could not be read because its bytes are wrong."""


class Output(NamedTuple):
    """What the command prints, and its exit status."""

    text: str
    status: int = 0


def make_output(arguments: argparse.Namespace) -> Output:
    """Return what the arguments ask for."""
    for option, least in (("limit", 0), ("depth", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise ValueError(f"{COMMAND}: expected --{option} {least} or more, got {value}")
    if arguments.findings and (arguments.html is not None or arguments.depth is not None):
        raise ValueError(f"{COMMAND}: expected --findings without --html and --depth")
    if arguments.html is not None:
        check_page_path(arguments.html)
        arguments.limit = MAX_TENSORS if arguments.limit is None else arguments.limit
    wanted = {"findings": arguments.findings, "depth": arguments.depth}
    missing = {"map": arguments.map, "strip-a": arguments.strip_a, "strip-b": arguments.strip_b}
    is_one = arguments.other is None
    for option, value in (missing if is_one else wanted).items():
        if value:
            files = "two checkpoints, got one" if is_one else "one checkpoint, got two"
            raise ValueError(f"{COMMAND}: --{option}: expected {files}")
    return _summarize(arguments) if is_one else _compare(arguments)


def _summarize(arguments: argparse.Namespace) -> Output:
    _check_sort(arguments.sort, STATS)
    with reporting() as progress:
        summary = summarize_file(
            arguments.file, include=arguments.include, exclude=arguments.exclude, progress=progress
        )
    record, findings, limit = record_of(summary), summary.findings(), arguments.limit
    status = _status(arguments.fail_on, record.skipped, findings, _nonfinite(record))
    notes = display.file_notes(record)
    if arguments.fail_on is not None and not len(summary):
        print_lines([f"{COMMAND}: --fail-on {arguments.fail_on}: there is no tensor to check"])
        status = status or FOUND
    if arguments.findings:
        return Output(_findings_text(arguments, findings[:limit], notes), status)
    if not len(summary):
        is_selection = arguments.include or arguments.exclude
        first = "no tensors selected" if is_selection else NO_TENSORS
        notes = [first, *(note for note in notes if note != NO_TENSORS)]
    shown = record if arguments.depth is None else _by_module(record, arguments.depth)
    if arguments.json or arguments.csv:
        names = display.ordered(shown, arguments.sort)[:limit]
        rows = list(_rows(shown, names))
        if arguments.csv:
            print_lines(notes)
            return Output(csv_text(_FIELDS, rows), status)
        content = {
            "params": {row.pop("name"): row for row in rows},
            "total": summary.total.to_dict(),
            "skipped": dict(record.skipped),
            "findings": [_finding_fields(finding) for finding in findings],
            "notes": list(notes),
        }
        return Output(json.dumps(content, indent=1) + "\n", status)
    table = display.table(shown, arguments.sort, limit)
    table.findings, table.notes = findings.at_least(Severity.WARNING), notes
    if arguments.html is not None:
        return Output(_write_page(arguments, table), status)
    if not len(summary):
        return Output("".join(f"{note}\n" for note in notes), status)
    if table.findings:
        table.notes = [*notes, "", str(table.findings)]
    return Output(display.for_print(table) + "\n", status)


def _compare(arguments: argparse.Namespace) -> Output:
    a, b, sort, limit = arguments.file, arguments.other, arguments.sort, arguments.limit
    _check_sort(sort, (*_CHANGE_STATS, "unchanged"))
    with reporting() as progress:
        comparison = compare_files(
            a,
            b,
            include=arguments.include,
            exclude=arguments.exclude,
            map=[_replacement(text) for text in arguments.map],
            strip_a=arguments.strip_a,
            strip_b=arguments.strip_b,
            progress=progress,
        )
    status = _status(arguments.fail_on, comparison.skipped, Findings(), _nonfinite_rows(comparison))
    if not comparison.rows:
        status = status or FOUND
    if sort is not None:
        rows = tuple(sort_changes(comparison.rows, sort))
        comparison = dataclasses.replace(comparison, rows=rows)
    if arguments.json:
        shown = dataclasses.replace(comparison, rows=comparison.rows[:limit])
        return Output(json.dumps(shown.to_dict(), indent=1) + "\n", status)
    if arguments.csv:
        print_lines(list_uncompared(comparison))
        rows = comparison.rows[:limit]
        return Output(csv_text(Change._fields, [row.to_dict() for row in rows]), status)
    table = make_table(comparison, limit, sort)
    if arguments.html is not None:
        return Output(_write_page(arguments, table), status)
    text = f"a: {one_line_name(a)}\nb: {one_line_name(b)}\n"
    if not comparison.rows:
        return Output(text + "".join(f"{note}\n" for note in table.notes), status)
    return Output(f"{text}{display.for_print(table)}\n", status)


def _check_sort(sort: str | None, stats: Sequence[str]) -> None:
    """Raise ValueError for an unknown --sort, before a file is read."""
    if sort is not None and sort != "name" and (word := sort.removeprefix("-")) not in stats:
        near = [repr(stat) for stat in stats if word in stat]
        hint = f"; did you mean {' or '.join(near)}?" if word and near else ""
        if stats is STATS:
            hint = did_you_mean(word) or hint
        raise ValueError(
            f"{COMMAND}: expected --sort to be one of name, {', '.join(stats)}, or --sort=-STAT "
            f"for the smallest first, got {sort!r}{hint}"
        )


def _replacement(text: str) -> tuple[str, str]:
    """Return the regular expression and the replacement of a --map."""
    pattern, equals, replacement = text.rpartition("=")
    if not equals:
        raise ValueError(f"{COMMAND}: expected --map REGEX=REPLACEMENT, got {text!r}")
    return pattern, replacement


def _status(
    fail_on: str | None, skipped: Mapping[str, str], findings: Findings, nonfinite: list[str]
) -> int:
    """Return the exit status; print why, if it is not 0.

    Args:
        fail_on: "error", "warning" or None.
        skipped: why tensors could not be read, by name.
        findings: of the model.
        nonfinite: names of tensors with NaN or infinite elements.
    """
    damaged = [name for name, reason in skipped.items() if reason.startswith(_DAMAGED)]
    if damaged:
        print_lines([f"{COMMAND}: {_count(damaged, 'tensor')} damaged, first {damaged[0]}"])
        return ERROR
    if fail_on is None:
        return 0
    names = [finding.name for finding in findings.at_least(Severity[fail_on.upper()])]
    failing = list(dict.fromkeys([*names, *nonfinite]))
    if failing:
        which = f"{_count(failing, 'tensor')}, first {failing[0]}"
        print_lines([f"{COMMAND}: --fail-on {fail_on}: {which}"])
    return FOUND if failing else 0


def _count(things: Sequence[str], what: str) -> str:
    return f"{len(things):,} {what}{'s' if len(things) > 1 else ''}"


def _nonfinite(record: Record) -> list[str]:
    """Return the names of tensors with NaN or infinite elements, in all groups, without masks."""
    assert record.file is not None
    groups = record.file.groups
    return [
        entry.name
        for row, entry in enumerate(entries(record))
        if is_read(entry.value)
        and entry.value.nonfinite_count
        and not is_mask(record.state(row))
        and not _is_first_score(groups[entry.name], entry.value.count, entry.value.norm)
    ]


def _nonfinite_rows(comparison: Comparison) -> list[str]:
    return [
        row.name
        for row in comparison.rows
        if not math.isfinite(norm := row.norm_a + row.norm_b)
        and not _is_first_score(row.group, row.count, norm)
    ]


def _is_first_score(group: str, count: float, norm: float) -> bool:
    """Return whether it is infinite because nothing is the best so far, as callbacks keep it."""
    return group == "other" and count == 1 and math.isinf(norm)


def _by_module(record: Record, depth: int) -> Record:
    """Return a record with a row per module, which has the group of its first tensor."""
    merged, rows = record.by_module(depth), record.layout.by_module(depth)[1]
    assert record.file is not None
    names = record.layout.names
    firsts = zip(merged.layout.names, rows, strict=True)
    groups = {module: record.file.groups[names[row[0]]] for module, row in firsts}
    return merged._replace(file=record.file._replace(groups=groups))


def _rows(record: Record, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the properties and statistics of tensors, with group and label."""
    summary, file = Summary(record), record.file
    assert file is not None
    for name in names:
        row = summary[name].to_dict()
        del row["kind"]  # the group says more
        yield {
            "name": name,
            **row,
            "group": file.groups[name],
            "label": file.labels.get(name, ""),
        }


def _finding_fields(finding: Any) -> dict[str, str]:
    texts = (finding.severity.name, finding.code.value, finding.name)
    return dict(zip(_FINDING_FIELDS, (*texts, finding.message, finding.advice), strict=True))


def _findings_text(
    arguments: argparse.Namespace, findings: Iterable[Any], notes: Sequence[str]
) -> str:
    """Return all findings: a line for each tensor, then the advice on each kind of finding.

    What was not read goes to stderr: it has no findings.
    """
    rows = [_finding_fields(finding) for finding in findings]
    if arguments.json:
        return json.dumps({"findings": rows, "notes": list(notes)}, indent=1) + "\n"
    print_lines(note for note in notes if note.startswith(_NOT_READ))
    if arguments.csv:
        return csv_text(_FINDING_FIELDS, rows)
    lines = [
        f"{row['severity']} {one_line_name(row['name'])}: {row['code']}: {row['message']}"
        for row in rows
    ]
    advice = dict.fromkeys(f"{row['code']}: {row['advice']}" for row in rows)
    return "\n".join([*lines, "", *advice] if lines else ["no findings"]) + "\n"


def _write_page(arguments: argparse.Namespace, table: Table) -> str:
    sources = [arguments.file] if arguments.other is None else [arguments.file, arguments.other]
    write_page(arguments.html, sources, table)
    return f"wrote {one_line_name(arguments.html)}\n"
